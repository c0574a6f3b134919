"""The index of a sharded checkpoint: hostile, damaged and stale ones are refused by name, with the way out."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import write_checkpoint, write_shards
from tiny_names import folder_of

from fxquant.checkpoint import index as checkpoint_index
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.errors import FxquantError

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards: a and c in the first, b and d in the second."""
    shards = folder_of(tmp_path, {})
    (shards / "model.safetensors").unlink()
    write_shards(shards, {name: torch.full((4,), float(value)) for value, name in enumerate("abcd")}, shards=2)
    return shards


def write_index(folder: Path, **weight_map: Any) -> None:
    whole = {"a": FIRST, "b": SECOND, "c": FIRST, "d": SECOND, **weight_map}
    (folder / INDEX).write_text(json.dumps({"weight_map": whole}))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("w" * 300 + ".safetensors", "names wwww.*312 bytes, the limit is"),
        ("\0.safetensors", r"outside the folder, such as '\\x00.safetensors'"),
        ("\x1b[2J.safetensors", r"outside the folder, such as '\\x1b"),
        ("", "outside the folder, such as ''"),
        ("..", "outside the folder, such as '..'"),
        ("\ud800.safetensors", "lone surrogate"),
        ("pytorch_model.bin", "pytorch_model.bin, which is not a .safetensors file"),
        (None, "not a safetensors index: it has no weight_map of file names"),
        (["a"], "not a safetensors index: it has no weight_map of file names"),
    ],
    ids=["300 letters", "zero byte", "escape", "empty", "parent", "surrogate", "format", "null", "list"],
)
def test_names_of_files(file: Any, message: str, folder: Path) -> None:
    write_index(folder, a=file)
    with pytest.raises(FxquantError, match=message):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["", "w" * 600, "a\x1b[31m", "a\0"], ids=repr)
def test_names_of_tensors(name: str, folder: Path) -> None:
    write_index(folder, **{name: FIRST})
    with pytest.raises(FxquantError, match=f"{INDEX}: a tensor name "):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["null", "1", '{"weight_map": null}', '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\udcff"]
)
def test_no_index(text: str, folder: Path) -> None:
    (folder / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FxquantError, match=INDEX):
        open_checkpoint(folder)


def test_too_many_entries(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the index, or in the files."""
    monkeypatch.setattr(checkpoint_index, "CHECKPOINT_TENSORS", 3)
    with pytest.raises(FxquantError, match=f"{INDEX}: 4 tensors, at most 3 are read"):
        open_checkpoint(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND}}))
    with pytest.raises(FxquantError, match=f"{INDEX}: 4 tensors, at most 3 are read"):
        open_checkpoint(folder)


@pytest.mark.slow
def test_a_million_entries(folder: Path) -> None:
    write_index(folder, **{f"w{index}": FIRST for index in range(1_000_000)})
    with pytest.raises(FxquantError, match=r"1,000,004 tensors, at most 400,000 are read"):
        open_checkpoint(folder)


def test_an_index_that_waits_for_ever(folder: Path) -> None:
    (folder / INDEX).unlink()
    os.mkfifo(folder / INDEX)
    with pytest.raises(FxquantError, match="not a regular file"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda file: file.symlink_to(file.name), "not a link to a file"),
        (lambda file: file.symlink_to("absent"), "not a link to a file"),
        (os.mkfifo, "not a file"),
        (Path.mkdir, "not a file"),
        (lambda file: file.symlink_to("/dev/zero"), "not a link to a file"),
        (lambda file: file.touch(), "not a complete safetensors file: 0 bytes"),
    ],
    ids=["cycle of links", "dangling link", "pipe", "folder", "device", "empty"],
)
def test_shards_that_are_no_files(make: Any, message: str, folder: Path) -> None:
    (folder / SECOND).unlink()
    make(folder / SECOND)
    with pytest.raises(FxquantError, match=f"{SECOND}: {message}"):
        open_checkpoint(folder)


def test_an_index_from_before_a_cast_is_stale(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    index = json.loads((folder / INDEX).read_text())
    weights = [name for name in index["weight_map"] if name.endswith("_proj.weight")]
    index["weight_map"] |= {f"{name}_scale_inv": index["weight_map"][name] for name in weights}
    (folder / INDEX).write_text(json.dumps(index))
    fact = rf"lists {len(weights)} block scales that no file holds, such as .*; their weights are not FP8. The checkp"
    with pytest.raises(FxquantError, match=fact) as caught:
        open_checkpoint(folder)
    assert caught.value.remedy == "Remove the names of scales from its weight_map. No weight is missing."


def test_a_stale_index_hides_no_missing_weight(folder: Path) -> None:
    write_index(folder, a_scale_inv=FIRST, e=SECOND)
    with pytest.raises(FxquantError, match=f"tensor e is not in {SECOND}"):
        open_checkpoint(folder)


def test_a_missing_scale_of_an_fp8_weight_is_missing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {})
    (folder / "model.safetensors").unlink()
    write_shards(folder, {"a": torch.ones(2, 2).to(torch.float8_e4m3fn), "b": torch.ones(2)}, shards=2)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": FIRST, "b": SECOND, "a_scale_inv": FIRST}}))
    with pytest.raises(FxquantError, match=f"tensor a_scale_inv is not in {FIRST}"):
        open_checkpoint(folder)


def test_a_shard_of_another_version(folder: Path) -> None:
    write_index(folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["c"]
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(FxquantError, match=f"tensor c is in a shard but not in the index: {FIRST} belongs to another"):
        open_checkpoint(folder)
