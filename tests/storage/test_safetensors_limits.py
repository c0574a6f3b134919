"""Hostile headers: refused in seconds and megabytes, whatever they hold."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from test_safetensors_file import entry, write

from fxquant.errors import FxquantError
from fxquant.storage import safetensors as safetensors_file
from fxquant.storage.safetensors import read_header, read_metadata


def test_numbers_of_thousands_of_digits_cost_nothing(tmp_path: Path) -> None:
    shape = b",".join([b"9" * 4000] * 2000)
    header = b'{"a":{"dtype":"F32","shape":[' + shape + b'],"data_offsets":[0,0]}}'
    started = time.monotonic()
    with pytest.raises(FxquantError, match="a number of 4,000 characters, at most 40 are read"):
        read_header(write(tmp_path / "t.safetensors", header))
    assert time.monotonic() - started < 5


@pytest.mark.slow
def test_too_many_tensors(tmp_path: Path) -> None:
    """Refused before they are parsed: 1.2 million empty tensors took more than a minute."""
    entries = (f'"{index:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for index in range(1_200_000))
    header = "{" + ",".join(entries) + "}"
    started = time.monotonic()
    with pytest.raises(FxquantError, match=r"more than 250,000 tensors.*Split it into shards"):
        read_header(write(tmp_path / "t.safetensors", header.encode()))
    assert time.monotonic() - started < 10


def test_more_tensors_than_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted before they are parsed, or after that where their keys are escaped."""
    monkeypatch.setattr(safetensors_file, "TENSORS", 2)
    with pytest.raises(FxquantError, match=r"more than 2 tensors, the limit of one file\. Split it into shards"):
        read_header(write(tmp_path / "t.safetensors", {name: entry(shape=[0], offsets=[0, 0]) for name in "abc"}))
    entries = (f'"{index}":{{"dtype":"F32","shape":[0],"data\\u005foffsets":[0,0]}}' for index in range(3))
    with pytest.raises(FxquantError, match="3 tensors, at most 2 are read"):
        read_header(write(tmp_path / "t.safetensors", ("{" + ",".join(entries) + "}").encode()))


def test_many_values_that_are_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="has 3,000,001 commas, at most 3,000,000 are read"):
        read_header(write(tmp_path / "t.safetensors", b"[" + b"0," * 3_000_001 + b"0]"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "a tensor name of 0 characters"),
        ("w" * 513, "a tensor name of 513 characters, 'wwww"),
        ("a\x1b[31m", r"a tensor name with control characters, 'a\\x1b\[31m'"),
        ("a\0", r"control characters, 'a\\x00'"),
        ("a\u202eb", r"control characters, 'a\\u202eb'"),
        ("a\n", r"control characters, 'a\\n'"),
    ],
)
def test_names_that_nobody_gives(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FxquantError, match=message):
        read_header(
            write(tmp_path / "t.safetensors", {"w": entry(offsets=[0, 4]), name: entry(offsets=[4, 8])}, bytes(8))
        )


def test_a_name_twice(tmp_path: Path) -> None:
    text = json.dumps(entry(offsets=[0, 4]))
    with pytest.raises(FxquantError, match="duplicate key 'a'"):
        read_header(write(tmp_path / "t.safetensors", f'{{"a":{text},"a":{text}}}'.encode(), bytes(4)))


def test_a_lone_surrogate_in_a_name(tmp_path: Path) -> None:
    header = f'{{"\\ud800":{json.dumps(entry())}}}'.encode()
    with pytest.raises(FxquantError, match="lone surrogate"):
        read_header(write(tmp_path / "t.safetensors", header, bytes(4)))


@pytest.mark.parametrize("shape", [[0, 1 << 62], [1 << 31, 0, 1 << 31]], ids=str)
def test_an_empty_tensor_that_torch_could_not_make(tmp_path: Path, shape: list[int]) -> None:
    with pytest.raises(FxquantError, match="not a valid empty tensor"):
        read_header(write(tmp_path / "t.safetensors", {"a": entry(shape=shape, offsets=[0, 0])}))


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for name in ("pipe", "folder", "device"):
        with pytest.raises(FxquantError, match=f"{name}.safetensors: not a regular file"):
            read_header(tmp_path / f"{name}.safetensors")
    for name in ("loop", "absent"):
        with pytest.raises(FxquantError, match=f"{name}.safetensors: (is missing|cannot be read)"):
            read_header(tmp_path / f"{name}.safetensors")
    write(tmp_path / "t.safetensors", {})
    monkeypatch.setattr(Path, "open", raising(PermissionError(13, "Permission denied")))
    with pytest.raises(FxquantError, match="cannot be read: Permission denied"):
        read_header(tmp_path / "t.safetensors")


def raising(error: Exception) -> Any:
    def fail(*arguments: Any, **named: Any) -> None:
        raise error

    return fail


@pytest.mark.parametrize("metadata", [[], "text", {"a": 1}, {"a": {}}], ids=str)
def test_metadata_that_is_not_texts(tmp_path: Path, metadata: Any) -> None:
    with pytest.raises(FxquantError, match="__metadata__ has values that are not strings"):
        read_metadata(write(tmp_path / "t.safetensors", {"__metadata__": metadata}))


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(FxquantError, match="Git LFS pointer.*:\ngit lfs pull"):
        read_header(file)
