"""How an output is served: said by every verb, written beside the weights, and read so; changed graphs are refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FEW_MODULES
from typer.testing import CliRunner, Result

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target
from fxquant.frontend import published
from fxquant.frontend.published import difference
from fxquant.frontend.source import open_source
from fxquant.lowering.output_folder.manifest import MANIFEST, read_manifest
from fxquant.lowering.output_folder.serving_page import SERVING
from fxquant.tools.main import app
from fxquant.tracing import trace

HALVED = """
from fxquant.models import DecoderLayer, DeepseekV3
CHECKPOINT = {checkpoint!r}
class Halved(DecoderLayer):
    def forward(self, x, cos, sin, attention_mask, past):
        y, present = super().forward(x, cos, sin, attention_mask, past)
        return x + (y - x) * 0.5, present
def build_model(config):
    return DeepseekV3(config, layer=Halved)
"""
DYNAMIC = {"policy": "deepseek_w4a8_dynamic", "export": False}


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def halved(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    file = tmp_path / "model.py"
    file.write_text(HALVED.format(checkpoint=str(tiny_folder(**FEW_MODULES))))
    return file


def test_ranks_asked_for_are_checked_read_and_written(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """k of an expert is one group: two ranks need whole experts."""
    source, out = tiny_folder(), tmp_path / "out"
    with pytest.raises(FxquantError, match="--ep N"):
        fxquant.compile(source, CompileOptions(**DYNAMIC, out=out, tp=2))
    report = fxquant.compile(source, CompileOptions(**DYNAMIC, out=out, tp=2, ep=2))
    assert report.verification is not None and report.verification.verdict == "verified"
    names = [check.name for check in report.verification.checks]
    assert "contract of ascend, ranks: 2, expert-parallel: 2" in names
    assert any(name.endswith("on 2 ranks, experts whole: results ≈ graph") for name in names)
    line = "--quantization ascend --tensor-parallel-size 2 --enable-expert-parallel"
    assert report.serve == f"vllm serve {out} {line}"
    page, manifest = (out / SERVING).read_text(), read_manifest(out)
    assert f'vllm serve "$PWD" {line}\n' in page and "fxquant verify . --tp 2 --ep 2\n" in page
    assert (manifest.tp, manifest.ep, manifest.graph_only) == (2, 2, False) and SERVING in manifest.digests
    assert "| int4 scales | two-level, groups of 256 |" in page and "vllm-ascend 0.11.0" in page
    misses = [miss for check in fxquant.verify(out, source, tp=2).checks for miss in check.misses]
    facts = (
        "experts that 2 ranks split are read wrong",
        "in_features 128 on each of 2 ranks is not a multiple of group_size 256",
    )
    found = [[fact for fact in facts if fact in miss] for miss in misses]
    assert sorted(map(tuple, found)) == sorted([(facts[0],)] * 3 + [(facts[1],)]), misses
    assert fxquant.verify(out, source, ep=4).verdict == "verified"


def test_convert_says_how_to_serve_too(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    options = CompileOptions(policy="deepseek_w4a8_per_channel", target=Target.VLLM_ASCEND, out=tmp_path / "out")
    fxquant.compile(tiny_folder(**FEW_MODULES), options)
    report = fxquant.convert(tmp_path / "out", Target.ASCEND, tmp_path / "new", export=False)
    assert report.serve.startswith(f"vllm serve {tmp_path / 'new'} ")
    assert report.serve.partition(" --")[2] in (tmp_path / "new" / SERVING).read_text()


@pytest.mark.parametrize("verb", ["plan", "compile"])
def test_a_graph_that_no_engine_runs_is_refused_with_its_layer(verb: str, halved: Path, tmp_path: Path) -> None:
    error: Any = invoke(verb, str(halved), "-p", "deepseek_w4a8_dynamic", "-o", str(tmp_path / "out")).exception
    assert isinstance(error, FxquantError) and error.place == "layer model.layers.0"
    assert "sub" in error.fact and "rms_norm" in error.fact and "--graph-only" in error.remedy
    assert not (tmp_path / "out").exists()


def test_a_graph_for_itself_claims_no_engine(halved: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = fxquant.compile(halved, CompileOptions(**DYNAMIC, out=out, graph_only=True))
    assert report.verification is not None and report.verification.verdict == "verified" and report.graph_only
    assert not any("contract" in check.name or "vllm" in check.name for check in report.verification.checks)
    assert "weight files" in report.verification.unread and report.serve == f"model_ascend.Model.load({str(out)!r})"
    assert "**No engine.**" in (out / SERVING).read_text() and read_manifest(out).graph_only
    with pytest.raises(FxquantError, match="runs the published graph with its own code"):
        fxquant.convert(out, Target.MINDIE, tmp_path / "new")
    (out / MANIFEST).unlink()
    alone = fxquant.verify(out, halved, target=Target.ASCEND)
    assert not any("contract" in check.name for check in alone.checks) and "weight files" in alone.unread
    assert {"contract of ascend, ranks: 1"} & {check.name for check in fxquant.verify(plain(halved, tmp_path)).checks}


def plain(halved: Path, tmp_path: Path) -> Path:
    """An output of a model file that changes nothing."""
    file = tmp_path / "plain.py"
    file.write_text(halved.read_text().replace("x + (y - x) * 0.5", "y"))
    return fxquant.compile(file, CompileOptions(**DYNAMIC, out=tmp_path / "plain", verify=False)).out


def test_onnx_runs_any_graph_and_is_no_way_to_an_engine(halved: Path, tmp_path: Path) -> None:
    out = fxquant.compile(halved, CompileOptions(**DYNAMIC, target=Target.ONNX, out=tmp_path / "out")).out
    with pytest.raises(FxquantError, match="model.layers.0"):
        fxquant.convert(out, Target.ASCEND, tmp_path / "new")


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {}, "no q_lora": {"q_lora_rank": None}, "biased": {"attention_bias": True},
    "float16": {"dtype": torch.float16},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_folder_has_the_published_graph(
    name: str, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is not traced twice; here it is."""
    monkeypatch.setattr(published, "trace", trace)
    published._published.cache_clear()
    source = open_source(tiny_folder(**CONFIGS[name]))
    assert not source.from_file and difference(source.program()) is None


def test_plan_says_how_to_serve(tiny_folder: Callable[..., Path]) -> None:
    result = invoke("plan", str(tiny_folder()), "-p", "deepseek_w4a8_dynamic", "--tp", "2", "--ep", "8", "--json")
    line = (
        "vllm serve OUT --quantization ascend --tensor-parallel-size 2 --data-parallel-size 4 --enable-expert-parallel"
    )
    assert json.loads(result.stdout)["serve"] == line
