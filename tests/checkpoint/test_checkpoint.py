"""Folders of safetensors in: every dtype, FP8 blocks, shards, and what is refused."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import encode_fp8, random_tensors, stored_tensors, write_checkpoint, write_shards
from tiny_names import folder_of
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, decode_fp8, open_checkpoint
from fxquant.errors import FxquantError
from fxquant.storage.safetensors import TensorInfo
from fxquant.text.token_ids import token_ids_from

INDEX = "model.safetensors.index.json"


def sharded(path: Path) -> Path:
    """Two shards: a and c in the first, b and d in the second."""
    folder = folder_of(path, {})
    (folder / "model.safetensors").unlink()
    write_shards(folder, {name: torch.full((4,), float(value)) for value, name in enumerate("abcd")}, shards=2)
    return folder


def edit_index(folder: Path, **weight_map: str | None) -> None:
    """Change or, with None, remove entries of the index."""
    index = json.loads((folder / INDEX).read_text())
    merged = {**index["weight_map"], **weight_map}
    index["weight_map"] = {name: file for name, file in merged.items() if file is not None}
    (folder / INDEX).write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


# reading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 3])
def test_reads_float_checkpoints_as_they_are(tiny_folder: Callable[..., Path], dtype: torch.dtype, shards: int) -> None:
    checkpoint = open_checkpoint(tiny_folder(dtype=dtype, shards=shards))
    expected = stored_tensors(random_tensors(checkpoint.config, 0), dtype, fp8=False)
    assert checkpoint.dtype is dtype
    assert sorted(checkpoint.tensors) == sorted(expected)
    assert checkpoint.scales == {}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in expected.values())
    for name, tensor in expected.items():
        read = checkpoint.read(name)
        assert read.dtype is checkpoint.stored_dtype(name) is tensor.dtype
        assert torch.equal(read, tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 2])
def test_reads_fp8_checkpoints_decoded(tiny_folder: Callable[..., Path], dtype: torch.dtype, shards: int) -> None:
    checkpoint = open_checkpoint(tiny_folder(dtype=dtype, fp8=True, shards=shards))
    plain = random_tensors(checkpoint.config, 0)
    stored = stored_tensors(plain, dtype, fp8=True)
    assert set(checkpoint.tensors) == set(plain)
    assert set(checkpoint.scales) == {name.removesuffix("_scale_inv") for name in stored if name.endswith("_scale_inv")}
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in stored.values())
    for name in plain:
        read = checkpoint.read(name)
        if name not in checkpoint.scales:
            assert torch.equal(read, stored[name])
            continue
        assert read.dtype is checkpoint.stored_dtype(name) is dtype
        # E4M3 keeps four significant bits: half a step is 1/16, of at least the block's smallest normal number; the
        # model's dtype adds one part in 256
        error = (read.float() - plain[name]).abs()
        assert (error <= plain[name].abs() * (1 / 16 + 1 / 256) + plain[name].abs().max() * 2.0**-10 / 448).all()


@pytest.mark.parametrize(
    ("shape", "block"), [((130, 257), (128, 128)), ((5, 7), (2, 3)), ((4, 6), (2, 3)), ((1, 1), (8, 8))]
)
def test_fp8_blocks_against_a_loop(shape: tuple[int, int], block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(shape, generator=generator) * 50).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1]), generator=generator)
    decoded = decode_fp8(weight, scales, block)
    assert decoded.dtype is torch.float32
    wide = weight.float()
    for row in range(shape[0]):
        for column in range(0, shape[1], 1 if shape[1] < 10 else 32):
            assert decoded[row, column] == wide[row, column] * scales[row // block[0], column // block[1]]


def test_block_size_is_read_from_the_config(tmp_path: Path) -> None:
    weight = torch.ones(4, 6).to(torch.float8_e4m3fn)
    scales = torch.arange(4.0).view(2, 2)
    method = {"quant_method": "fp8", "weight_block_size": [2, 3]}
    folder = folder_of(
        tmp_path, {"w": weight, "w_scale_inv": scales}, quantization_config=method, torch_dtype="float32"
    )
    assert open_checkpoint(folder).read("w").tolist() == [[0.0] * 3 + [1.0] * 3] * 2 + [[2.0] * 3 + [3.0] * 3] * 2


def test_opening_reads_no_tensor(tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TensorInfo, "read_bytes", None)
    checkpoint = open_checkpoint(tiny_folder(fp8=True, shards=2))
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        checkpoint.read("model.norm.weight")


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({"torch_dtype": "float16"}, torch.float16),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": None, "dtype": "float16"}, torch.float16),
        ({}, torch.bfloat16),
    ],
)
def test_model_dtype_is_read_from_either_key(tmp_path: Path, keys: dict[str, Any], dtype: torch.dtype) -> None:
    assert Checkpoint(tmp_path, keys, {}).dtype is dtype


def test_unknown_model_dtype(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"config\.json: torch_dtype is 'float64'\. Use bfloat16, float16"):
        _ = Checkpoint(tmp_path, {"torch_dtype": "float64"}, {}).dtype


def test_tensors_of_the_prediction_layer_are_there(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny(fp8=True, num_nextn_predict_layers=1)
    assert {"model.layers.2.eh_proj.weight", "model.layers.2.shared_head.head.weight"} <= set(checkpoint.tensors)
    assert checkpoint.stored_dtype("model.layers.2.eh_proj.weight") is torch.bfloat16


# refusing: folders and shards


def test_no_config(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"not a checkpoint: it has no config\.json"):
        open_checkpoint(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FxquantError, match="no safetensors file"):
        open_checkpoint(tmp_path)


def test_several_files_need_an_index(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / INDEX).unlink()
    with pytest.raises(FxquantError, match="2 safetensors files and no index"):
        open_checkpoint(folder)


def test_two_indexes(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    shutil.copy(folder / INDEX, folder / "old.safetensors.index.json")
    with pytest.raises(FxquantError, match="2 index files"):
        open_checkpoint(folder)


def test_missing_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    (folder / SECOND).unlink()
    with pytest.raises(FxquantError, match=rf"{SECOND}: missing shard \(1 of 2\)"):
        open_checkpoint(folder)


def test_truncated_shard(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 3)
    with pytest.raises(FxquantError, match=f"{SECOND}: truncated"):
        open_checkpoint(folder)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "."])
def test_index_that_names_a_path_outside(tmp_path: Path, file: str) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, a=file)
    with pytest.raises(FxquantError, match="names files outside the folder"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1, "b": "c"}}', "\udcff"]
)
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    folder = sharded(tmp_path)
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FxquantError, match="not a safetensors index|not JSON|not valid UTF-8"):
        open_checkpoint(folder)


def test_tensor_that_the_index_promises_is_absent(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, e=FIRST)
    with pytest.raises(FxquantError, match=f"tensor e is not in {FIRST}"):
        open_checkpoint(folder)


def test_tensor_that_the_index_leaves_out(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, c=None)
    with pytest.raises(FxquantError, match="tensor c is in a shard but not in the index"):
        open_checkpoint(folder)


def test_tensor_in_another_shard_than_the_index_says(tmp_path: Path) -> None:
    folder = sharded(tmp_path)
    edit_index(folder, a=SECOND)
    with pytest.raises(FxquantError, match=f"tensor a is in {FIRST}, not {SECOND}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_tensor_in_two_shards(tmp_path: Path, named: str) -> None:
    folder = sharded(tmp_path)
    for file in (FIRST, SECOND):
        save_file({**load_file(folder / file), "twice": torch.ones(1)}, folder / file)
    edit_index(folder, twice=named)
    with pytest.raises(FxquantError, match="tensor twice is in "):
        open_checkpoint(folder)


# refusing: FP8 and quantized checkpoints


def test_scale_of_a_tensor_that_is_not_fp8(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"w": torch.ones(2, 2), "w_scale_inv": torch.ones(1, 1)})
    with pytest.raises(FxquantError, match="w_scale_inv scales w, which is not FP8"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shape", [(2, 2), (4,)], ids=["matrix", "vector"])
def test_fp8_without_scale(tmp_path: Path, shape: tuple[int, ...]) -> None:
    folder = folder_of(tmp_path, {"w": torch.ones(shape).to(torch.float8_e4m3fn)})
    with pytest.raises(FxquantError, match="FP8 tensor w has no scale_inv"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(2, 1), r"\[2, 1\], not \[1, 2\], one per block of 128 x 128"),
        (torch.ones(1), r"\[1\], not \[1, 2\]"),
        (torch.ones(1, 2).to(torch.int8), "block scales in torch.int8. fxquant reads torch.float32, torch.bfloat16"),
    ],
    ids=["rows", "rank", "dtype"],
)
def test_scale_that_does_not_fit(tmp_path: Path, scale: Tensor, message: str) -> None:
    weight, _ = encode_fp8(torch.ones(128, 130))
    folder = folder_of(tmp_path, {"w": weight, "w_scale_inv": scale})
    with pytest.raises(FxquantError, match=f"w_scale_inv: {message}"):
        open_checkpoint(folder)


@pytest.mark.parametrize("method", [{"quant_method": "gptq"}, {"bits": 4}, "awq", []], ids=str)
def test_already_quantized(tmp_path: Path, method: Any) -> None:
    folder = write_checkpoint(tmp_path, quantization_config=method)
    with pytest.raises(FxquantError, match=r"already quantized: .*float checkpoints and DeepSeek's official FP8"):
        open_checkpoint(folder)


@pytest.mark.parametrize("size", [[128], [128, 0], 128, None, [128.0, 128.0]], ids=str)
def test_block_size_that_is_none(tmp_path: Path, size: Any) -> None:
    folder = folder_of(tmp_path, {}, quantization_config={"quant_method": "fp8", "weight_block_size": size})
    with pytest.raises(FxquantError, match="weight_block_size .* two positive integers"):
        open_checkpoint(folder)


def test_quantization_config_of_just_a_name(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"w": torch.ones(1)}, quantization_config="fp8")
    with pytest.raises(FxquantError, match="quant_method|quantization_config"):
        open_checkpoint(folder)


# token ids


def test_token_ids_are_the_single_tensor(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(6).view(2, 3)}, tmp_path / "ids.safetensors")
    assert token_ids_from(tmp_path / "ids.safetensors").tolist() == [[0, 1, 2], [3, 4, 5]]


def test_token_ids_of_two_tensors(tmp_path: Path) -> None:
    save_file({"a": torch.arange(2), "b": torch.arange(2)}, tmp_path / "ids.safetensors")
    with pytest.raises(FxquantError, match=r"holds 2 tensors\. It must hold one int64 tensor"):
        token_ids_from(tmp_path / "ids.safetensors")


def test_token_ids_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"ids\.safetensors: is missing"):
        token_ids_from(tmp_path / "ids.safetensors")
