"""Contracts as `compile` meets them: before a weight is read, and told in its report."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.api import CompileReport, compile
from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.program.program_file import load_program
from fxquant.storage.safetensors import TensorInfo
from fxquant.verification import Check

Folder = Callable[..., Path]


def test_nothing_is_read_before_a_refusal(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: TensorInfo, *_: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(TensorInfo, "read", read)
    monkeypatch.setattr(TensorInfo, "read_bytes", read)
    options = CompileOptions(policy="deepseek_w4a8_msmodelslim", out=tmp_path / "out", target=Target.VLLM_ASCEND)
    with pytest.raises(FxquantError, match="load experts with one scale per channel only") as caught:
        compile(tiny_folder(), options)
    assert caught.value.place.startswith("layer model.layers.") and "group_size: 0" in str(caught.value.remedy)
    assert not list(tmp_path.iterdir())


def test_unverified_cells_compile_and_are_told(tiny_folder: Folder, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "extends: deepseek_w4a8_dynamic\nrules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}]"
    )
    report = compile(tiny_folder(), CompileOptions(policy=str(policy), out=tmp_path / "out"))
    assert len(report.unverified) == 1 and "group_size 64" in report.unverified[0] and "#5603" in report.unverified[0]
    weights = reader_check(report)
    assert weights.checked == sum(len(recipe.modules) for recipe in load_program(report.out / GRAPH).recipes.values())
    assert "not read" not in weights.worst


def test_an_unverified_module_that_the_reader_refuses_is_told(tiny_folder: Folder, tmp_path: Path) -> None:
    """A dynamic linear with a bias: q_a_proj, kv_a_proj_with_mqa and o_proj of two layers."""
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out")
    report = compile(tiny_folder(attention_bias=True), options)
    assert report.verification is not None and report.verification.verdict == "verified"
    assert "bias" in report.unverified[0] and reader_check(report).worst == "6 unverified modules are not read"


def reader_check(report: CompileReport) -> Check:
    """What verification says of the integers that the engine's reader ends up with."""
    assert report.verification is not None
    return next(candidate for candidate in report.verification.checks if candidate.name.endswith(": weights == graph"))


def test_ranks_are_checked_by_compile(tiny_folder: Folder, tmp_path: Path) -> None:
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out", tp=2)
    with pytest.raises(FxquantError, match="experts that 2 ranks split are read wrong"):
        compile(tiny_folder(), options)
