"""Folders of DeepSeek's converted parts: the same checkpoint as the Hugging Face folder, and what is refused."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filling import fill_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import rewritten
from tiny_names import ARGS, SPLITTABLE, assert_same, edit, name_pairs, write_parts
from torch import Tensor

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.checkpoint.model_parallel_parts import JoinedTensor
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.layout import plan_files, stored_tensors
from fxquant.lowering.weights import tensor_bytes
from fxquant.storage.safetensors import TensorInfo, read_header

Folder = Callable[..., Path]
CHANGES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8": {"fp8": True},
    "bf16 with bias": {"attention_bias": True},
    "fp8 without query latent": {"fp8": True, "q_lora_rank": None},
}
EMBED, NORM, GATE = "embed.weight", "norm.weight", "layers.1.ffn.gate.weight"


@pytest.fixture
def parts(tiny_folder: Folder, tmp_path: Path) -> Path:
    """A good checkpoint of two parts that a test may spoil."""
    return write_parts(tmp_path, tiny_folder(**SPLITTABLE), 2)


# reading


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("kind", CHANGES)
def test_parts_are_the_hugging_face_checkpoint(tiny_folder: Folder, tmp_path: Path, kind: str, count: int) -> None:
    source = tiny_folder(**SPLITTABLE, **CHANGES[kind])
    assert_same(open_checkpoint(write_parts(tmp_path, source, count)), open_checkpoint(source))


def test_every_kind_of_tensor_is_in_the_cases(tiny_folder: Folder) -> None:
    names = {name for changes in CHANGES.values() for name in read_header(written(tiny_folder, changes))}
    dense = ("layers.0.mlp.gate.", "layers.0.mlp.experts.", "layers.0.mlp.shared_experts.")
    moe = tuple(f"layers.1.mlp.{name}_proj." for name in ("gate", "up", "down"))
    expected = {official for official, _, _ in name_pairs()}
    assert names == {name for name in expected if not name.removeprefix("model.").startswith(dense + moe)}


def written(tiny_folder: Folder, changes: dict[str, Any]) -> Path:
    return tiny_folder(**SPLITTABLE, **changes) / "model.safetensors"


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_with_the_config_of_the_inference_code(tiny_folder: Folder, tmp_path: Path, dtype: str) -> None:
    source = tiny_folder(**SPLITTABLE, fp8=dtype == "fp8")
    joined = open_checkpoint(write_parts(tmp_path, source, 4, ARGS | {"dtype": dtype}))
    expected = open_checkpoint(source)
    assert_same(joined, expected)
    assert parse_config(joined.config, "found") == parse_config(expected.config, "expected")
    method = expected.config.get("quantization_config")
    assert joined.config.get("quantization_config") == method


def test_one_file_of_another_name(tiny_folder: Folder, tmp_path: Path) -> None:
    source = tiny_folder(**SPLITTABLE)
    folder = write_parts(tmp_path, source, 1)
    (folder / "model0-mp1.safetensors").rename(folder / "model.safetensors")
    assert_same(open_checkpoint(folder), open_checkpoint(source))


def test_a_file_of_hugging_face_names_called_a_part(tiny_folder: Folder, tmp_path: Path) -> None:
    source = tiny_folder()
    shutil.copy(source / "config.json", tmp_path)
    shutil.copy(source / "model.safetensors", tmp_path / "model0-mp1.safetensors")
    assert_same(open_checkpoint(tmp_path), open_checkpoint(source))


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_whole_in_a_file_is_a_range_of_it(tiny_folder: Folder, tmp_path: Path, count: int) -> None:
    tensors = open_checkpoint(write_parts(tmp_path, tiny_folder(**SPLITTABLE), count)).tensors
    split = {official for official, _, dim in name_pairs() if dim is not None and ".experts." not in official}
    joined = {name for name, info in tensors.items() if isinstance(info, JoinedTensor)}
    assert joined == (split & set(tensors) if count > 1 else set())


def test_opening_reads_no_tensor(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorInfo, "read_bytes", None)
    checkpoint = open_checkpoint(parts)
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        checkpoint.read("lm_head.weight")


def test_compiles_to_the_same_bytes(tiny_folder: Folder, tmp_path: Path) -> None:
    source = tiny_folder(**SPLITTABLE, fp8=True)
    files = []
    for folder in (source, write_parts(tmp_path, source, 2)):
        checkpoint, out = open_checkpoint(folder), tmp_path / f"out{len(files)}"
        program = rewritten(checkpoint, "deepseek_w4a8_dynamic")
        out.mkdir()
        layouts = plan_files(stored_tensors(program, checkpoint), 1 << 30, ENGINES[Target.ASCEND])
        fill_folder(layouts, checkpoint, out)
        files.append([(out / layout.name).read_bytes() for layout in layouts])
    assert files[0] == files[1]


# joining


@st.composite
def joins(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """A tensor of one to three dimensions, one of them, and a number of equal parts along it."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    dim, count = draw(st.integers(0, len(shape) - 1)), draw(st.integers(1, 5))
    shape[dim] *= count
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8]))
    return (torch.arange(torch.Size(shape).numel()) % 101).view(shape).to(dtype), dim, count


@given(joins(), st.data())
@settings(max_examples=60)
def test_joins_what_chunk_splits(join: tuple[Tensor, int, int], data: st.DataObject) -> None:
    whole, dim, count = join
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{part}.safetensors" for part in range(count)]
        for file, part in zip(files, whole.chunk(count, dim), strict=True):
            save_file({"before": torch.ones(3), "w": part.contiguous()}, file)
        joined = JoinedTensor("w", tuple(read_header(file)["w"] for file in files), dim)
        assert (joined.dtype, joined.shape, joined.nbytes) == (whole.dtype, tuple(whole.shape), whole.nbytes)
        assert torch.equal(joined.read().view(torch.uint8), whole.view(torch.uint8))
        start = data.draw(st.integers(0, whole.nbytes))
        length = data.draw(st.integers(0, whole.nbytes - start))
        assert joined.read_bytes(start, length) == tensor_bytes(whole)[start : start + length]


@pytest.mark.parametrize("dim", [0, 1])
def test_joins_parts_that_are_empty(tmp_path: Path, dim: int) -> None:
    save_file({"w": torch.ones(0, 0)}, tmp_path / "w.safetensors")
    joined = JoinedTensor("w", (read_header(tmp_path / "w.safetensors")["w"],) * 2, dim)
    assert joined.read().shape == joined.shape == (0, 0)
    assert joined.read_bytes(0, 0) == b""


# refusing


@pytest.mark.parametrize("index", [0, 1])
def test_missing_part(parts: Path, index: int) -> None:
    (parts / f"model{index}-mp2.safetensors").unlink()
    with pytest.raises(FxquantError, match=rf"model{index}-mp2\.safetensors: missing: .* has 2 parts"):
        open_checkpoint(parts)


@pytest.mark.parametrize("name", ["model0-mp1", "model2-mp2", "model00-mp2", "other"])
def test_file_that_is_none_of_the_parts(parts: Path, name: str) -> None:
    shutil.copy(parts / "model0-mp2.safetensors", parts / f"{name}.safetensors")
    with pytest.raises(FxquantError, match=rf"{name}\.safetensors: is not one of the 2 parts"):
        open_checkpoint(parts)


def test_a_number_of_parts_that_no_memory_holds(parts: Path) -> None:
    shutil.copy(parts / "model0-mp2.safetensors", parts / f"model0-mp{10**15}.safetensors")
    with pytest.raises(FxquantError, match=r"model1-mp1000000000000000\.safetensors: missing"):
        open_checkpoint(parts)


@pytest.mark.parametrize("name", [EMBED, NORM, GATE])
@pytest.mark.parametrize("index", [0, 1])
def test_tensor_that_a_part_lacks(parts: Path, name: str, index: int) -> None:
    official = next(official for official, theirs, _ in name_pairs() if theirs == name)
    edit(parts / f"model{index}-mp2.safetensors", **{name: None})
    with pytest.raises(FxquantError, match=rf"model{index}-mp2.*: tensor {official} of model{1 - index}-mp2.* is miss"):
        open_checkpoint(parts)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (EMBED, torch.ones(63, 256).bfloat16(), r"model\.embed_tokens\.weight is torch\.bfloat16\[63, 256\], .*\[64, "),
        (NORM, torch.ones(64).bfloat16(), r"model\.norm\.weight is torch\.bfloat16\[64\], but torch\.bfloat16\[256\]"),
        (NORM, torch.ones(256), r"model\.norm\.weight is torch\.float32\[256\], but torch\.bfloat16\[256\]"),
    ],
    ids=["split", "shape", "dtype"],
)
def test_parts_that_differ(parts: Path, name: str, tensor: Tensor, message: str) -> None:
    edit(parts / "model1-mp2.safetensors", **{name: tensor})
    with pytest.raises(FxquantError, match=rf"model1-mp2\.safetensors: tensor {message}"):
        open_checkpoint(parts)


def test_expert_in_two_parts(parts: Path) -> None:
    edit(parts / "model1-mp2.safetensors", **{"layers.1.ffn.experts.0.w1.weight": torch.ones(512, 256).bfloat16()})
    with pytest.raises(FxquantError, match=r"model1-mp2.*experts\.0\.gate_proj\.weight is also in model0-mp2\.safe"):
        open_checkpoint(parts)


def test_expert_in_no_part_is_missing_for_the_model(parts: Path) -> None:
    edit(parts / "model0-mp2.safetensors", **{"layers.1.ffn.experts.0.w1.weight": None})
    assert "model.layers.1.mlp.experts.0.gate_proj.weight" not in open_checkpoint(parts).tensors


def test_truncated_part(parts: Path) -> None:
    file = parts / "model1-mp2.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FxquantError, match=r"model1-mp2\.safetensors: truncated"):
        open_checkpoint(parts)
