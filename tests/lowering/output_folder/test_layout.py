"""Which tensors go into which file and where, planned from headers and the graph alone."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import float_program, rewritten, write_checkpoint, write_shards

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.engines.table import ENGINES, Target
from fxquant.lowering.output_folder.layout import FileLayout, StoredTensor, plan_files, stored_tensors
from fxquant.policy.policy import shipped_policies
from fxquant.schemes.schemes import Scheme, TensorSpec, tensor_specs
from fxquant.storage.safetensors import TensorInfo

Tiny = Callable[..., Checkpoint]
NAME = "quant_model_weight_w8a8"


def tensor(name: str, nbytes: int, dtype: torch.dtype = torch.int8) -> StoredTensor:
    return StoredTensor(name, TensorSpec(dtype, (nbytes // dtype.itemsize,), "FLOAT"), name)


def layout(checkpoint: Checkpoint, policy: str, size: int = 1 << 30) -> list[FileLayout]:
    return plan_files(stored_tensors(rewritten(checkpoint, policy), checkpoint), size, ENGINES[Target.ASCEND])


def held(files: list[FileLayout]) -> list[list[str]]:
    return [[tensor.name for tensor in file.tensors] for file in files]


# which tensors


def test_stored_tensors_of_the_tiny_model(tiny: Tiny) -> None:
    stored = {t.name: t for t in stored_tensors(rewritten(tiny(), "deepseek_w4a8"), tiny())}
    expert, linear = "model.layers.1.mlp.experts.7.down_proj", "model.layers.0.self_attn.q_b_proj"
    specs = {name.removeprefix(expert): t.spec for name, t in stored.items() if name.startswith(expert)}
    assert specs == {
        ".weight": TensorSpec(torch.int8, (128, 256), "W4A8_DYNAMIC"),
        ".weight_scale": TensorSpec(torch.float32, (256, 1), "W4A8_DYNAMIC"),
        ".weight_offset": TensorSpec(torch.float32, (256, 1), "W4A8_DYNAMIC"),
        ".weight_scale_second": TensorSpec(torch.float32, (256, 1), "W4A8_DYNAMIC"),
        ".weight_offset_second": TensorSpec(torch.int64, (256, 1), "W4A8_DYNAMIC"),
        ".scale_bias": TensorSpec(torch.float32, (256, 16), "W4A8_DYNAMIC"),
    }
    specs = {name.removeprefix(linear): t.spec for name, t in stored.items() if name.startswith(linear)}
    assert specs == {
        ".weight": TensorSpec(torch.int8, (96, 64), "W8A8"),
        ".weight_scale": TensorSpec(torch.float32, (96, 1), "W8A8"),
        ".weight_offset": TensorSpec(torch.float32, (96, 1), "W8A8"),
        ".input_scale": TensorSpec(torch.bfloat16, (1,), "W8A8"),
        ".input_offset": TensorSpec(torch.bfloat16, (1,), "W8A8"),
        ".quant_bias": TensorSpec(torch.int32, (96,), "W8A8"),
        ".deq_scale": TensorSpec(torch.float32, (96,), "W8A8"),
    }
    assert stored["model.norm.weight"].spec == TensorSpec(torch.bfloat16, (256,), "FLOAT")
    assert stored["model.layers.1.mlp.experts.0.up_proj.scale_bias"].spec.shape == (256, 1)


@pytest.mark.parametrize("policy", shipped_policies())
def test_every_tensor_comes_from_a_recipe_or_the_checkpoint(policy: str, tiny: Tiny) -> None:
    checkpoint = tiny(attention_bias=True)
    program = rewritten(checkpoint, policy)
    stored = stored_tensors(program, checkpoint)
    names = [t.name for t in stored]
    quantized = {
        f"{module}.{suffix}"
        for recipe in program.recipes.values() for module in recipe.modules for suffix in tensor_specs(recipe)
    }  # fmt: skip
    consumed = {name for recipe in program.recipes.values() for name in recipe.source_names}
    assert len(names) == len(set(names)) and set(names) == quantized | set(checkpoint.tensors) - consumed
    assert {t.name for t in stored if t.recipe is not None} == quantized
    for t in stored:
        described = Scheme.FLOAT if t.recipe is None or t.name.endswith(".bias") else t.recipe.scheme
        assert t.spec.description == described.value, t.name


def test_the_graph_without_a_rewrite_stores_the_checkpoint(tiny: Tiny) -> None:
    """FP8 weights come decoded, in the model's dtype, and their scales are gone."""
    checkpoint = tiny(fp8=True)
    stored = stored_tensors(float_program(checkpoint), checkpoint)
    assert {t.name for t in stored} == set(checkpoint.tensors)
    dtypes = {t.name: t.spec.dtype for t in stored}
    assert dtypes.pop("model.layers.1.mlp.gate.e_score_correction_bias") is torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_float16_models_store_their_own_dtypes(tiny: Tiny) -> None:
    checkpoint = tiny(dtype=torch.float16)
    specs = {t.name: t.spec for t in stored_tensors(rewritten(checkpoint, "deepseek_w4a8"), checkpoint)}
    linear = "model.layers.0.self_attn.o_proj"
    assert specs[f"{linear}.deq_scale"].dtype is torch.int64
    assert specs[f"{linear}.input_scale"].dtype is specs[f"{linear}.input_offset"].dtype is torch.float16
    assert specs["model.norm.weight"].dtype is torch.float16


def test_the_gates_bias_is_float32_whatever_the_source_has(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    write_shards(folder, tensors | {name: tensors[name].bfloat16()})
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tensors[name].dtype is torch.bfloat16
    specs = {t.name: t.spec for t in stored_tensors(float_program(checkpoint), checkpoint)}
    assert specs[name] == TensorSpec(torch.float32, (8,), "FLOAT")
    assert specs["model.layers.1.mlp.gate.weight"].dtype is torch.bfloat16


def test_planning_reads_no_tensor(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, program = tiny(fp8=True), rewritten(tiny(fp8=True), "deepseek_w4a8")

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorInfo, "read", refuse)
    monkeypatch.setattr(TensorInfo, "read_bytes", refuse)
    files = plan_files(stored_tensors(program, checkpoint), 1 << 20, ENGINES[Target.ASCEND])
    assert len(files) > 1


def test_order_is_that_of_the_graph_and_not_of_the_source(tiny: Tiny) -> None:
    plain, sharded = tiny(), tiny(shards=3)
    assert [t.name for t in stored_tensors(rewritten(plain, "deepseek_w8a8"), plain)] == [
        t.name for t in stored_tensors(rewritten(sharded, "deepseek_w8a8"), sharded)
    ]
    names = [t.name for t in stored_tensors(float_program(plain), plain)]
    first = [names.index(name) for name in ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")]
    last = [names.index(name) for name in ("model.layers.1.mlp.experts.0.up_proj.weight", "lm_head.weight")]
    assert first + last == sorted(first + last)


# which file


def test_one_file_has_no_number() -> None:
    (file,) = plan_files([tensor("a", 10), tensor("b", 20)], 30, ENGINES[Target.ASCEND])
    assert file.name == f"{NAME}.safetensors"


def test_files_are_filled_up_to_the_limit() -> None:
    stored = [tensor(name, 10) for name in "abcde"]
    files = plan_files(stored, 20, ENGINES[Target.ASCEND])
    assert held(files) == [["a", "b"], ["c", "d"], ["e"]]
    assert [file.name for file in files] == [f"{NAME}-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    assert held(plan_files(stored, 19, ENGINES[Target.ASCEND])) == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_a_larger_tensor_has_a_file_of_its_own() -> None:
    assert held(plan_files([tensor("a", 10), tensor("b", 50), tensor("c", 10)], 20, ENGINES[Target.ASCEND])) == [
        ["a"],
        ["b"],
        ["c"],
    ]
    assert held(plan_files([tensor("b", 50)], 20, ENGINES[Target.ASCEND])) == [["b"]]


@pytest.mark.parametrize("size", [1, 100_000, 400_000, 1 << 20])
def test_a_file_ends_where_the_next_tensor_would_not_fit(size: int, tiny: Tiny) -> None:
    stored = stored_tensors(rewritten(tiny(), "deepseek_w4a8"), tiny())
    remaining = list(stored)
    for file in plan_files(stored, size, ENGINES[Target.ASCEND]):
        count, used = len(file.tensors), sum(t.nbytes for t in file.tensors)
        part, remaining = remaining[:count], remaining[count:]
        assert {t.name for t in file.tensors} == {t.name for t in part}
        assert used <= size or count == 1
        assert not remaining or used + remaining[0].nbytes > size
    assert remaining == []


# where in the file


def test_wide_items_come_first_then_names() -> None:
    stored = [tensor("b", 8), tensor("z", 8, torch.int64), tensor("a", 8), tensor("y", 8, torch.bfloat16)]
    assert held(plan_files([*stored, tensor("x", 8, torch.float32)], 1 << 20, ENGINES[Target.ASCEND])) == [
        ["z", "x", "y", "a", "b"]
    ]


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "float"])
@pytest.mark.parametrize("size", [200_000, 1 << 30])
def test_every_tensor_is_aligned_and_none_overlap(policy: str, size: int, tiny: Tiny) -> None:
    for file in layout(tiny(dtype=torch.float16), policy, size):
        assert len(file.header) % 4096 == 0 and file.offsets[0] == len(file.header)
        position = len(file.header)
        for t, offset in zip(file.tensors, file.offsets, strict=True):
            assert offset == position and offset % t.spec.dtype.itemsize == 0
            position += t.nbytes
        assert position == file.nbytes


def test_the_header_says_what_the_plan_says(tiny: Tiny) -> None:
    (file,) = layout(tiny(), "deepseek_w4a8")
    (length,) = struct.unpack("<Q", file.header[:8])
    assert length == len(file.header) - 8
    header = json.loads(file.header[8:])
    assert header.pop("__metadata__") == {"format": "pt"}
    names = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.float32: "F32", torch.bfloat16: "BF16"}
    assert header == {
        t.name: {
            "dtype": names[t.spec.dtype],
            "shape": list(t.spec.shape),
            "data_offsets": [offset - len(file.header), offset - len(file.header) + t.nbytes],
        }
        for t, offset in zip(file.tensors, file.offsets, strict=True)
    }


def test_two_plans_are_the_same(tiny: Tiny) -> None:
    assert layout(tiny(), "deepseek_w4a8", 300_000) == layout(tiny(shards=2), "deepseek_w4a8", 300_000)
