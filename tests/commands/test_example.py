"""The shipped example through the whole pipeline: what the README promises."""

from pathlib import Path

import pytest
from calibrated import calibrated_once
from places import EXAMPLE
from slowness import POLICIES as FEW_POLICIES

import fxquant
from fxquant import CompileOptions
from fxquant.engines.table import Target
from fxquant.policy.policy import shipped_policies

__all__ = ["calibrated_once"]

pytestmark = pytest.mark.slow


COMPILED = [(policy, Target.ASCEND) for policy in shipped_policies()]
COMPILED += [(policy, Target.ONNX) for policy in FEW_POLICIES]
COMPILED += [("deepseek_w4a8_shared_w4", Target.MINDIE), ("deepseek_w8a8_mix", Target.VLLM_ASCEND)]
"""test_engines.py has the other engines' own policies."""


@pytest.fixture(scope="module")
def onnx_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example compiled to ONNX, calibrated on the text beside it."""
    out = tmp_path_factory.mktemp("example") / "onnx"
    return fxquant.compile(EXAMPLE / "model.py", CompileOptions(target=Target.ONNX, out=out)).out


@pytest.mark.parametrize(("policy", "target"), COMPILED, ids=str)
def test_every_policy_compiles_and_verifies(policy: str, target: Target, tmp_path: Path) -> None:
    report = fxquant.compile(EXAMPLE, CompileOptions(policy=policy, target=target, out=tmp_path / "out"))
    assert report.verification is not None
    assert report.verification.verdict == "verified"
    assert sum(entry.nbytes for entry in report.ledger.entries) == sum(
        info.nbytes for info in source_tensors().values()
    )


def test_quantized_example_is_close_to_float(onnx_out: Path) -> None:
    result = fxquant.evaluate(onnx_out, EXAMPLE / "evaluation.jsonl", samples=32)
    assert result.quantized_perplexity < 1.02 * result.float_perplexity  # measured 1.007
    assert 0 < result.kl_mean < 0.01  # measured 0.0047
    assert result.top1_agreement > 0.93  # measured 0.948


def test_run_writes_text(onnx_out: Path) -> None:
    assert "".join(fxquant.run(onnx_out, "def main(", max_new_tokens=16))


def source_tensors() -> dict:
    from fxquant.checkpoint.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(EXAMPLE)
    return {**checkpoint.tensors, **{f"{name}.scale": info for name, info in checkpoint.scales.items()}}
