"""Compiled folders as engines read them, against the graph: equal where all is right, a miss where something is not.

fxquant wrote the folders; the readers that judge them share no code with it.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from open_readers import open_reader
from safetensors import safe_open
from safetensors.torch import save_file
from slowness import others_slow
from torch import Tensor

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.runtime.weight_providers import Cached
from fxquant.verification.blocks import block_names, walk
from fxquant.verification.engine_check import EngineChecker
from fxquant.verification.report import Check

MIXED = """
extends: deepseek_w4a8_per_channel
rules:
  - {kind: attention, path: "*.kv_b_proj", scheme: FLOAT, why: inference absorbs it}
  - {kind: attention, scheme: W8A8_MIX}
"""
CASES = {
    "vllm-ascend": (Target.VLLM_ASCEND, "deepseek_w4a8_per_channel"),
    "vllm-ascend-per-group": (Target.ASCEND, "deepseek_w4a8"),
    "sglang-npu": (Target.SGLANG_NPU, "deepseek_w4a8_per_channel_static"),
    "mindie": (Target.MINDIE, "deepseek_w4a8"),
    "mindie-2.1rc1": (Target.MINDIE_2_1RC1, "deepseek_w4a8_dynamic"),
}
DOWN = "model.layers.1.mlp.experts.3.down_proj"
STATIC = "model.layers.0.self_attn.q_a_proj"


@dataclass
class Compiled:
    """A folder, its program, and the values of every block of the graph."""

    folder: Path
    program: Program
    values: dict[str, dict[str, Any]]

    def check(self, reader: str, folder: Path | None = None, ranks: int = 1) -> dict[str, Check]:
        """Last word of a check's name → the check, for `folder` or the one that was compiled."""
        checker = EngineChecker(self.program, open_reader(reader, folder or self.folder, ranks))
        for block, values in self.values.items():
            checker.check(block, values)
        names = ("weights", "activations", "results", "device")
        return dict(zip(names, checker.checks, strict=True))


Compile = Callable[..., Compiled]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Compile:
    """`compiled(target, policy)`, once each."""
    done: dict[tuple, Compiled] = {}
    ids = tmp_path_factory.mktemp("calibration") / "ids.safetensors"
    save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))}, ids)

    def get(target: Target, policy: str, **model: Any) -> Compiled:
        key = (target, policy, repr(model))
        if key not in done:
            out = tmp_path_factory.mktemp(target) / "out"
            options = CompileOptions(policy=policy, target=target, out=out, calib=ids, verify=False)
            fxquant.compile(tiny_folder(**model), options)
            program, files = load_program(out / GRAPH), WeightFiles(out)
            done[key] = Compiled(out, program, dict(walk(program, Cached(files.read), set(block_names(program)))))
        return done[key]

    return get


def spoil(folder: Path, copy: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy with changed tensors and no index."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.index.json"))
    (file,) = copy.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return copy


@pytest.mark.parametrize("dtype", others_slow([torch.bfloat16, torch.float16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("reader", CASES)
def test_every_engine_reads_what_the_graph_computes(compiled: Compile, reader: str, dtype: torch.dtype) -> None:
    """SGLang takes bfloat16 alone, so for float16 nothing is written that its reader could see."""
    if CASES[reader][0] is Target.SGLANG_NPU and dtype is torch.float16:
        with pytest.raises(FxquantError, match="models in float16: the engine loads bfloat16"):
            compiled(*CASES[reader], dtype=dtype)
        return
    checks = compiled(*CASES[reader], dtype=dtype).check(reader)
    assert {name: check.misses for name, check in checks.items()} == dict.fromkeys(checks, [])
    assert checks["weights"].checked == 8 * 3 + 2 * 4 + 3 + 3, "experts, attentions, the dense MLP, the shared expert"
    for name in ("activations", "results", "device"):
        assert 2 * 4 + 3 + 3 < checks[name].checked <= checks["weights"].checked, "experts without rows are not run"
    assert all(checks[name].worst for name in ("results", "device"))


def test_ranks_get_their_parts(compiled: Compile) -> None:
    checks = compiled(*CASES["vllm-ascend"]).check("vllm-ascend", ranks=4)
    assert [check.misses for check in checks.values()] == [[], [], [], []]
    assert checks["results"].checked > checks["activations"].checked, "each rank of a row-parallel linear too"


def test_mixed_linears_are_held_against_the_graph_of_decode(compiled: Compile, tmp_path: Path) -> None:
    (tmp_path / "mixed.yaml").write_text("description: mixed attention\n" + MIXED)
    checks = compiled(Target.VLLM_ASCEND, str(tmp_path / "mixed.yaml")).check("vllm-ascend")
    assert [check.misses for check in checks.values()] == [[], [], [], []]


def test_groups_that_an_engine_no_longer_reads(compiled: Compile) -> None:
    with pytest.raises(FxquantError, match="per-group experts are no longer read"):
        compiled(*CASES["vllm-ascend-per-group"]).check("vllm-ascend")


def missing(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{DOWN}.scale_bias"]


def swapped_nibbles(tensors: dict[str, Tensor]) -> None:
    weight = tensors[f"{DOWN}.weight"]
    tensors[f"{DOWN}.weight"] = (weight << 4) | (weight >> 4 & 15)


def no_scale_bias(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.endswith(".down_proj.scale_bias")]:
        tensors[name].zero_()


def offset_by_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STATIC}.input_offset"] += 1


def unfused_input(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STATIC}.input_scale"] *= 2


def wide_quant_bias(tensors: dict[str, Tensor]) -> None:
    tensors[f"{STATIC}.quant_bias"] += 1


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (missing, "weights", f"{DOWN}: not loaded: {DOWN}.scale_bias: missing"),
        (swapped_nibbles, "weights", f"{DOWN}: "),
        (no_scale_bias, "results", "down_proj: off by"),
        (offset_by_one, "weights", "fused, but with input_offset"),
        (unfused_input, "weights", "fused, but with input_scale"),
        (wide_quant_bias, "results", f"{STATIC}: off by"),
    ],
)
def test_what_engine_and_graph_disagree_on_is_a_miss(
    compiled: Compile, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], check: str, message: str
) -> None:
    right = compiled(*CASES["sglang-npu"])
    checks = right.check("sglang-npu", spoil(right.folder, tmp_path / "copy", change))
    assert any(message in miss for miss in checks[check].misses), checks[check].misses
    untouched = {"weights", "activations", "results", "device"} - {check}
    assert all(checks[name].ok for name in untouched - {"results"})


def test_columns_of_another_rank_are_a_miss_on_ranks_only(compiled: Compile, tmp_path: Path) -> None:
    def roll(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".down_proj.scale_bias")]:
            tensors[name] = tensors[name].roll(4, 1)

    right = compiled(*CASES["vllm-ascend"])
    copy = spoil(right.folder, tmp_path / "copy", roll)
    assert right.check("vllm-ascend", copy)["results"].ok
    misses = right.check("vllm-ascend", copy, ranks=4)["results"].misses
    assert misses and all("on rank" in miss for miss in misses)
