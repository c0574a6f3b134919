"""Hostile files of token ids: refused by name before memory is taken."""

import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.text import token_ids
from fxquant.text.load import load_batches

MODEL = Checkpoint(Path("model"), {"vocab_size": 20}, {})


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY" + version + len(text).to_bytes(2 if version[0] == 1 else 4, "little") + text + data


def described(descr: str = "'<i8'", order: str = "False", shape: str = "(1, 2)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


IDS = np.array([[1, 2]]).tobytes()
HOSTILE = {
    "a huge shape": (npy(described(shape="(1000000000, 1000000000)"), IDS), "bytes; the file has 16"),
    "sizes of thousands of digits": (
        npy(described(shape=f"({'9' * 4000}, 1)"), IDS),
        "not that of an array|bytes; the file has 16",
    ),
    "sizes of forty digits": (npy(described(shape=f"({'9' * 40}, 1)"), IDS), "bytes; the file has 16"),
    "fewer bytes than it says": (npy(described(), IDS[:-1]), "16 bytes; the file has 15"),
    "more bytes than it says": (npy(described(), IDS + b"0"), "16 bytes; the file has 17"),
    "a negative size": (npy(described(shape="(-1, -2)"), IDS), r"torch.int64\["),
    "a truth value for a size": (npy(described(shape="(True, 2)"), IDS), r"torch.int64\["),
    "an empty shape": (npy(described(shape="()"), IDS[:8]), r"torch.int64\[\]"),
    "a thousand dimensions": (npy(described(shape="(" + "1," * 1000 + ")"), IDS[:8]), r"torch.int64\[1, 1"),
    "brackets": (npy("[" * 5000), "not that of an array"),
    "parentheses": (npy("(" * 5000), "not that of an array"),
    "minus signs": (npy("-" * 9900 + "1"), "not that of an array"),
    "a long header": (npy(described() + " " * 60_000, IDS), "not that of an array: Header info length"),
    "four gigabytes of header": (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "not that of an array"),
    "version 9": (npy(described(), IDS, b"\x09\x00"), "not that of an array"),
    "objects": (npy(described("'|O'"), b"cos\nsystem\n(S'echo'\ntR."), "torch.object"),
    "a structure": (npy(described("[('a', '<i8')]"), IDS), "torch.void64"),
    "floats": (npy(described("'<f8'"), IDS), "torch.float64"),
    "code": (npy("__import__('os').system('true')"), "not that of an array"),
    "a zip archive": (b"PK\x03\x04" + bytes(100), "not that of an array"),
    "a pickle": (b"\x80\x04\x95" + bytes(50), "not that of an array"),
}


@pytest.mark.parametrize(("content", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_npy_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "ids.npy").write_bytes(content)
    with pytest.raises(FxquantError, match=message) as caught:
        load_batches(tmp_path / "ids.npy", MODEL, 8, 8)
    assert caught.value.place == str(tmp_path / "ids.npy") and len(str(caught.value)) < 600


def test_an_archive_of_arrays_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ids.npy", "w") as archive:
        archive.writestr("ids.npy", npy(described(), IDS))
    with pytest.raises(FxquantError, match="not that of an array"):
        load_batches(tmp_path / "ids.npy", MODEL, 8, 8)


def test_the_order_of_columns(tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.asfortranarray(np.arange(6).reshape(2, 3)))
    assert b"'fortran_order': True" in (tmp_path / "ids.npy").read_bytes()
    assert [ids.tolist() for ids in load_batches(tmp_path / "ids.npy", MODEL, 8, 8)] == [[[0, 1, 2]], [[3, 4, 5]]]


@pytest.mark.parametrize("name", ["ids.npy", "ids.safetensors"])
def test_a_large_file_is_refused_before_it_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_ids, "TOKEN_ID_BYTES", 15)
    np.save(tmp_path / "ids.npy", np.array([[1, 2]]))
    save_file({"ids": torch.tensor([[1, 2]])}, tmp_path / "ids.safetensors")
    with pytest.raises(FxquantError, match="16 bytes of ids, at most 15 are read"):
        load_batches(tmp_path / name, MODEL, 8, 8)


@pytest.mark.parametrize("suffix", ["txt", "json", "jsonl", "npy", "safetensors"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "not a regular file"),
        (Path.mkdir, "not a regular file"),
        (lambda file: file.symlink_to(file.name), "no such file"),
        (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
        (Path.touch, "text|array|safetensors|JSON"),
    ],
    ids=["pipe", "folder", "cycle of links", "device", "empty"],
)
def test_what_is_no_file(make: Callable[[Path], object], message: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"text.{suffix}"
    make(file)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = Checkpoint(tmp_path, {"vocab_size": 20}, {})
    with pytest.raises(FxquantError, match=f"{file.name}: .*({message})|tokenizer.json: cannot be read"):
        load_batches(file, model, 8, 8)


@pytest.mark.parametrize("name", ["a" * 300 + ".txt", "a\0.txt"], ids=["300 letters", "zero byte"])
def test_a_name_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="cannot be read|no such file"):
        load_batches(tmp_path / name, MODEL, 8, 8)
