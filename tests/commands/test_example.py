"""The shipped example through the whole pipeline: what the README promises."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from calibrated import calibrated_once
from places import EXAMPLE
from slowness import POLICIES as FEW_POLICIES

import fxquant
from fxquant import CompileOptions
from fxquant.api import open_output
from fxquant.engines.table import Target
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.policy.policy import shipped_policies
from fxquant.runtime.execute import generate, prefill_inputs
from fxquant.text.tokenizer import open_tokenizer
from fxquant.verification.noise import last_bit_noise

__all__ = ["calibrated_once"]
STEPS = 64
NOISE_SEEDS = 16

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


@pytest.mark.parametrize("document", range(5))
def test_onnx_and_fx_write_the_same_text(onnx_out: Path, document: int) -> None:
    program, stored = open_output(onnx_out)
    read = cache(stored)  # hundreds of steps read each weight
    line = (EXAMPLE / "evaluation.jsonl").read_text().splitlines()[document]
    prompt = [0, *open_tokenizer(onnx_out).encode(json.loads(line)["text"])[:40]]
    from_onnx = list(OnnxRunner(onnx_out).generate(prompt, STEPS))
    from_fx = list(generate(program, read, prompt, STEPS))
    assert len(from_onnx) == len(from_fx) == STEPS
    differ = [step for step in range(STEPS) if from_onnx[step].argmax() != from_fx[step].argmax()]
    if not differ:
        return
    # Both engines round correctly; a flip of one int8 code or one expert is legitimate where the two best tokens are
    # closer than such flips move the logits of the fx graph by itself.
    best, second = from_fx[differ[0]].topk(2).values.tolist()
    text = prompt + [int(logits.argmax()) for logits in from_fx[: differ[0]]]
    bound = last_bit_noise(program, read, prefill_inputs(program, torch.tensor([text])), NOISE_SEEDS).logit
    print(f"document {document}: first differs at token {differ[0]}, top-2 gap {best - second:.4g}, bound {bound:.4g}")
    assert best - second <= bound


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
