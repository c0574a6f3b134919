"""Damaged outputs without their manifest: verification names the tensor, and the engine's reader alone sees it too.

`pytest -s -m "" tests/verification/test_corruption.py` prints which checks caught what on which target.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from corruptions import CORRUPTIONS, damaged, open_folder
from safetensors.torch import save_file
from typer.testing import CliRunner

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engines.documents import group_size
from fxquant.engines.table import ENGINES, Target
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, LEDGER, MANIFEST, read_manifest
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.progress import silent
from fxquant.runtime.weight_providers import Cached, RecipeWeights
from fxquant.tools.main import app
from fxquant.verification.blocks import block_names, walk
from fxquant.verification.engine_check import EngineChecker
from fxquant.verification.file_checks import check_digests

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 128, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1,
}  # fmt: skip
GROUPS = """
description: static attention, int4 experts in two groups
extends: deepseek_w4a8
rules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}]
"""
IDS = "ids.safetensors"
PER_CHANNEL = "deepseek_w4a8_per_channel_static"
NPU = {Target.ASCEND: GROUPS, Target.MINDIE: GROUPS, Target.MINDIE_2_1RC1: GROUPS}
NPU |= {Target.SGLANG_NPU: PER_CHANNEL, Target.VLLM_ASCEND: PER_CHANNEL}
SLOW = (Target.SGLANG_NPU, Target.MINDIE_2_1RC1)
TARGETS = [pytest.param(target, marks=pytest.mark.slow if target in SLOW else ()) for target in NPU]
"""SGLang's form is that of vllm-ascend, under another reader."""
LACKS = dict.fromkeys((Target.SGLANG_NPU, Target.VLLM_ASCEND), ".weight_scale_second")
LACKS |= {Target.MINDIE_2_1RC1: ".scale_bias"}
"""What a form does not store can't be damaged."""
STATED = (Target.VLLM_ASCEND, Target.SGLANG_NPU)
"""Targets that an output without a manifest does not show by its files: each loads what the other does."""
WHOLE_EXPERTS = (Target.ASCEND, Target.SGLANG_NPU)
"""Engines that read such int4 experts on one rank only, and sum all columns of scale_bias there."""

SECTIONS = (Target.MINDIE,)
"""Engines whose reader here compares each linear with the type of its section in config.json."""


@dataclass(frozen=True)
class Case:
    """A compiled folder, and what the graph makes of integers that were made anew from its source."""

    source: Path
    folder: Path
    target: Target
    program: Program
    values: dict[str, dict[str, Any]]

    def verify(self, out: Path) -> dict[str, list[str]]:
        """Check → misses, where it has any; an error is one of "error"."""
        target = self.target if self.target in STATED else None
        try:
            report = fxquant.verify(out, against=self.source, target=target)
        except FxquantError as error:
            return {"error": [str(error)]}
        return {check.name: check.misses for check in report.checks if check.misses}

    def read(self, out: Path, ranks: int) -> dict[str, list[str]]:
        """The same of the engine's reader alone: nothing here but the files' bytes and the graph's values."""
        engine = ENGINES[self.target]
        assert engine.open_reader is not None
        try:
            checker = EngineChecker(self.program, engine.open_reader(out, ranks, group_size(self.program)))
        except FxquantError as error:
            return {"reader: error": [str(error)]}
        for block, values in self.values.items():
            checker.check(block, values)
        return {check.name: check.misses for check in checker.checks if check.misses}


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Callable[[Target], Case]:
    """`case(target)`, once each."""
    cases: dict[Target, Case] = {}
    base, source = tmp_path_factory.mktemp("corruption"), tiny_folder(**SHAPE)
    (base / "groups.yaml").write_text(GROUPS)
    save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))}, base / IDS)

    def get(target: Target) -> Case:
        if target not in cases:
            policy = str(base / "groups.yaml") if NPU[target] is GROUPS else NPU[target]
            options = CompileOptions(policy=policy, target=target, out=base / target, calib=base / IDS)
            fxquant.compile(source, options)
            program = load_program(base / target / GRAPH)
            transforms = load_calibration(base / target / CALIBRATION).transforms
            read = Cached(RecipeWeights(program, open_checkpoint(source).transformed(transforms)))
            cases[target] = Case(
                source, base / target, target, program, dict(walk(program, read, set(block_names(program))))
            )
        return cases[target]

    return get


Row = dict[str, dict[Target, str]]


@pytest.fixture(scope="module")
def seen() -> Iterator[Row]:
    """Corruption → target → the checks that caught it; printed at the end."""
    rows: Row = {}
    yield rows
    print("\n| corruption | " + " | ".join(NPU) + " |\n" + "|---" * (1 + len(NPU)) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(row.get(target, "") for target in NPU) + " |")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.slow
def test_what_is_right_is_no_miss(case: Callable, target: Target, tmp_path: Path) -> None:
    right = case(target)
    out = damaged(right.folder, tmp_path / "out", lambda folder: None)
    assert right.verify(out) == {}
    assert right.read(out, 1) == {}
    assert bool(right.read(out, 2)) is (target in WHOLE_EXPERTS)


DAMAGES = [
    pytest.param(name, target, marks=() if target is Target.ASCEND else pytest.mark.slow)
    for name, corruption in CORRUPTIONS.items()
    for target in NPU
    if corruption.needs != LACKS.get(target)
]


@pytest.mark.parametrize(("name", "target"), DAMAGES)
def test_every_corruption_is_named(case: Callable, seen: Row, target: Target, name: str, tmp_path: Path) -> None:
    right, corruption = case(target), CORRUPTIONS[name]
    assert corruption.fits(open_folder(right.folder))
    out = damaged(right.folder, tmp_path / "out", corruption.change)
    whole = target in WHOLE_EXPERTS
    misses_of, read = right.verify(out), right.read(out, 1 if whole else corruption.ranks)
    seen.setdefault(name, {})[target] = "; ".join([*misses_of, *(read or ["*not the reader*"])])
    assert any(corruption.named in miss for misses in misses_of.values() for miss in misses), misses_of
    unread = corruption.unread and not (corruption.sections and target in SECTIONS)
    assert bool(read) is not (unread or (whole and corruption.ranks > 1)), read


@pytest.mark.parametrize("target", TARGETS)
def test_a_truncated_file_is_named(case: Callable, seen: Row, target: Target, tmp_path: Path) -> None:
    out = damaged(case(target).folder, tmp_path / "out", lambda folder: None)
    (file,) = out.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    (error,) = case(target).verify(out)["error"]
    assert file.name in error and "truncated" in error
    seen.setdefault("file truncated", {})[target] = "error"


UNREAD = (LEDGER, FLOAT_GRAPH)
"""What no check reads but that of digests."""


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_one_byte_anywhere_changes_a_digest(case: Callable, target: Target, tmp_path: Path) -> None:
    right = case(target)
    manifest, out = read_manifest(right.folder), Path(shutil.copytree(right.folder, tmp_path / "out"))
    assert check_digests(manifest, out, silent).ok and {*manifest.digests, *manifest.weights} == set(manifest.files)
    for index, name in enumerate(manifest.files):
        path = out / name
        whole = path.read_bytes()
        place = len(whole) * (index + 1) // (len(manifest.files) + 1)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (miss,) = check_digests(manifest, out, silent).misses
        assert miss.startswith(f"{name}: ") and "XXH3" in miss
        if name in UNREAD:
            assert {check.name for check in fxquant.verify(out, right.source).checks if check.misses} == {
                "files: digest"
            }
        path.write_bytes(whole)


def test_a_damaged_weight_file_is_named_and_so_is_its_tensor(case: Callable, tmp_path: Path) -> None:
    """A digest that differs does not keep the other checks from saying where."""
    right = case(Target.ASCEND)
    out = Path(shutil.copytree(right.folder, tmp_path / "out"))
    (file,) = out.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # the last tensor of the file is an int8 weight
    misses = {check.name: check.misses for check in fxquant.verify(out, right.source).checks if check.misses}
    static = {"static parameters agree"}  # the sum of a static weight's codes is in its quant_bias
    assert set(misses) - static == {"files: digest", "quantized tensors == slow reference"}
    assert misses["files: digest"][0].startswith(file.name)
    assert ".weight: 1 elements differ" in misses["quantized tensors == slow reference"][0]


def test_without_a_manifest_it_asks_for_what_it_cannot_know(case: Callable, tmp_path: Path) -> None:
    out = damaged(case(Target.VLLM_ASCEND).folder, tmp_path / "out", lambda folder: None)
    with pytest.raises(FxquantError, match=f"has no {MANIFEST}.*--against MODEL"):
        fxquant.verify(out)
    with pytest.raises(FxquantError, match="its files fit vllm-ascend or sglang-npu.*--target vllm-ascend"):
        fxquant.verify(out, against=case(Target.VLLM_ASCEND).source)
    command = ["verify", str(out), "--against", str(case(Target.VLLM_ASCEND).source), "--target", "vllm-ascend", "-q"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0 and "verified" in result.output and "digest" not in result.output
    for name in (GRAPH, FLOAT_GRAPH, LEDGER):
        (out / name).unlink()  # now it is like a folder that others wrote
    assert fxquant.verify(out, against=case(Target.VLLM_ASCEND).source).verdict == "verified"
