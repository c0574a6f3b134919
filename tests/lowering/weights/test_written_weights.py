"""Weight files: the planned bytes, each module in memory once."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import fill_folder
from places import SUPPORT
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import rewritten, write_checkpoint, write_shards
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.checkpoint.model_parallel_parts import SourceTensor
from fxquant.checkpoint.stamped_bytes import StampedBytes
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.description import index
from fxquant.lowering.output_folder.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.weights import producer
from fxquant.program.program import Program
from fxquant.runtime.weight_providers import RecipeWeights
from fxquant.schemes.schemes import Recipe
from fxquant.verification.reference import contradiction, expected_tensors

Tiny = Callable[..., Checkpoint]
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp8 with bias in shards": {"fp8": True, "attention_bias": True, "shards": 3},
    "float16 with bias": {"dtype": torch.float16, "attention_bias": True},
    "float32": {"dtype": torch.float32},
}


def write(
    checkpoint: Checkpoint, policy: str, folder: Path, size: int = 1 << 30
) -> tuple[Program, list[FileLayout], int]:
    """The program, the plan and the bytes that were reported."""
    program, done = rewritten(checkpoint, policy), []
    files = plan_files(stored_tensors(program, checkpoint), size, ENGINES[Target.ASCEND])
    folder.mkdir()
    fill_folder(files, checkpoint, folder, done.append)
    return program, files, sum(done)


def stored_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of every file, through the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            assert handle.metadata() == {"format": "pt"}
            part = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def same(x: Tensor, y: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (x, y)]
    return x.dtype is y.dtype and x.shape == y.shape and torch.equal(*bits)


# the weight files


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS)
def test_files_hold_the_plan_made_by_recipes_as_the_slow_reference_makes_it(
    options: dict[str, Any], tiny: Tiny, tmp_path: Path
) -> None:
    checkpoint = tiny(**options)
    program, files, reported = write(checkpoint, "deepseek_w4a8", tmp_path / "out")
    tensors, weights = stored_in(tmp_path / "out"), RecipeWeights(program, checkpoint)
    planned = {tensor.name: tensor.spec for file in files for tensor in file.tensors}
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()} == {
        name: (spec.dtype, spec.shape) for name, spec in planned.items()
    }
    for name, tensor in tensors.items():
        assert same(tensor, weights(name)), name
    assert reported == sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "out" / files[0].name).stat().st_size == files[0].nbytes
    for recipe in program.recipes.values():
        for module in recipe.modules[:2]:
            check_module(checkpoint, recipe, module, tensors)
    for name in program.float_names():
        assert same(tensors[name], checkpoint.read(name)), name


def check_module(checkpoint: Checkpoint, recipe: Recipe, module: str, tensors: dict[str, Tensor]) -> None:
    bias = checkpoint.read(f"{module}.bias") if recipe.bias else None
    for suffix, tensor in expected_tensors(recipe, checkpoint.read(f"{module}.weight"), bias).items():
        assert same(tensors[f"{module}.{suffix}"], tensor), f"{module}.{suffix}"
    if recipe.scheme.static:
        own = {name.removeprefix(f"{module}."): t for name, t in tensors.items() if name.startswith(f"{module}.")}
        assert contradiction(recipe, own, bias) is None, module


def test_shards_hold_the_same_tensors_and_an_index_names_them(tiny: Tiny, tmp_path: Path) -> None:
    _, shard, _ = write(tiny(), "deepseek_w4a8", tmp_path / "one")
    _, many, reported = write(tiny(), "deepseek_w4a8", tmp_path / "many", 300_000)
    whole, parts = stored_in(tmp_path / "one"), stored_in(tmp_path / "many")
    assert len(shard) == 1 and len(many) > 3
    assert set(whole) == set(parts) and all(same(whole[name], parts[name]) for name in whole)
    document = index(many)
    assert document["metadata"] == {"total_size": reported}
    assert list(document["weight_map"]) == sorted(whole)
    for file in many:
        with safe_open(tmp_path / "many" / file.name, "pt") as handle:
            assert {document["weight_map"][name] for name in handle.keys()} == {file.name}  # noqa: SIM118


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "float"])
def test_the_same_input_gives_the_same_bytes(policy: str, tiny: Tiny, tmp_path: Path) -> None:
    """Twice, and from a checkpoint that is cut otherwise."""
    for name, options in (("first", {}), ("second", {}), ("third", {"shards": 3})):
        _, files, _ = write(tiny(**options), policy, tmp_path / name, 700_000)
    assert len(files) > 1
    contents = [
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("first", "second", "third")
    ]
    assert contents[0] == contents[1] == contents[2]


def test_the_gates_bias_is_widened(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = tensors[name].bfloat16()
    write_shards(folder, tensors)
    write(open_checkpoint(folder), "deepseek_w4a8", tmp_path / "out")
    assert same(stored_in(tmp_path / "out")[name], tensors[name].float())


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.6.down_proj.weight"
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 4] = float("nan")
    write_shards(folder, tensors)
    with pytest.raises(FxquantError, match="NaN or infinity") as caught:
        write(open_checkpoint(folder), "deepseek_w4a8_dynamic", tmp_path / "out")
    assert caught.value.place == name


# what is in memory


@dataclass
class Reads:
    """Every range that was read of a checkpoint's tensors, and the largest."""

    ranges: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def watch(self, monkeypatch: pytest.MonkeyPatch) -> "Reads":
        original = StampedBytes.read_into

        def read_into(files: StampedBytes, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
            self.ranges.setdefault(tensor.name, []).append((offset, offset + len(buffer)))
            original(files, tensor, offset, buffer)

        monkeypatch.setattr(StampedBytes, "read_into", read_into)
        return self

    @property
    def largest(self) -> int:
        return max(stop - start for ranges in self.ranges.values() for start, stop in ranges)


def covers_once(ranges: list[tuple[int, int]], nbytes: int) -> bool:
    """They lie one behind the other and fill the tensor."""
    ends = [0] + [stop for _, stop in sorted(ranges)]
    return [start for start, _ in sorted(ranges)] + [nbytes] == ends


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_source_byte_is_read_once_in_blocks(
    jobs: int, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(**MODELS["fp8 with bias in shards"])
    program = rewritten(checkpoint, "deepseek_w4a8")
    files = plan_files(stored_tensors(program, checkpoint), 1 << 30, ENGINES[Target.ASCEND])
    monkeypatch.setattr(producer, "BLOCK_BYTES", 4096)
    reads = Reads().watch(monkeypatch)
    fill_folder(files, checkpoint, tmp_path, jobs=jobs)
    infos = {info.name: info for info in (*checkpoint.tensors.values(), *checkpoint.scales.values())}
    assert reads.ranges.keys() == infos.keys()
    assert all(covers_once(reads.ranges[name], info.nbytes) for name, info in infos.items())
    # a block has as many rows as a block scale, at least
    widest = max(info.nbytes // info.shape[0] for info in checkpoint.tensors.values() if info.name in checkpoint.scales)
    assert reads.largest == 128 * widest


def test_kept_tensors_are_copied_in_ranges(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny()
    monkeypatch.setattr(producer, "BLOCK_BYTES", 1000)
    reads = Reads().watch(monkeypatch)
    write(checkpoint, "float", tmp_path / "out")
    assert reads.largest == 1000
    assert all(covers_once(reads.ranges[name], info.nbytes) for name, info in checkpoint.tensors.items())
    monkeypatch.undo()
    tensors = stored_in(tmp_path / "out")
    assert all(same(tensors[name], checkpoint.read(name)) for name in checkpoint.tensors)


MEASURE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from filling import fill_folder
from tiny import rewritten
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.kernels import module_tensors  # the compiler's own memory, whatever is quantized
from fxquant.engines.table import ENGINES
from fxquant.lowering.output_folder.layout import plan_files, stored_tensors
from fxquant.engines.table import Target

def memory(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024

checkpoint = open_checkpoint(Path(sys.argv[2]))
stored = stored_tensors(rewritten(checkpoint, "deepseek_w4a8_dynamic"), checkpoint)
files = plan_files(stored, 1 << 30, ENGINES[Target.ASCEND])
before = memory("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
fill_folder(files, checkpoint, Path(sys.argv[3]))
print(memory("VmHWM") - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A checkpoint of 250 MB whose largest module has 2 MB."""
    shape = {"hidden_size": 1024, "moe_intermediate_size": 1024, "n_routed_experts": 40, "first_k_dense_replace": 0}
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=1, **shape)
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(SUPPORT), str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # a module in float32 is 4 MB; quantizing it makes a dozen temporaries of that size
    assert grown < 72 << 20 < open_checkpoint(folder).nbytes / 3
