"""The container: what is read equals what the safetensors library writes, and what is written it reads."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save_file
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.storage import safetensors as safetensors_file
from fxquant.storage.safetensors import DTYPES, build_header, header_length, quoted_size, read_header


def tensor_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Random finite values."""
    values = torch.randint(-100, 100, shape, generator=torch.Generator().manual_seed(seed))
    return values.abs().to(dtype) if dtype in (torch.uint8, torch.float8_e8m0fnu) else values.to(dtype)


def as_bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def write(file: Path, header: Any, data: bytes = b"") -> Path:
    """A file with this header, JSON or raw bytes, and these tensor bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# reading


@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (2, 0, 3)], ids=str)
def test_reads_every_dtype(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {name: tensor_of(dtype, shape) for name, dtype in DTYPES.items()}
    save_file(tensors, tmp_path / "all.safetensors")
    infos = read_header(tmp_path / "all.safetensors")
    assert list(infos) == sorted(tensors)
    for name, tensor in tensors.items():
        info, read = infos[name], infos[name].read()
        assert (info.dtype, info.shape, info.nbytes) == (tensor.dtype, shape, tensor.nbytes)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert as_bytes(read) == as_bytes(tensor)


def test_reads_a_part_of_a_tensor(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(10), "b": torch.arange(100, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "two.safetensors")
    assert list(read_header(tmp_path / "two.safetensors")["b"].read_bytes(40, 5)) == [40, 41, 42, 43, 44]


def test_metadata_is_no_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert list(read_header(tmp_path / "m.safetensors")) == ["a"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    info = read_header(file)["a"]
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(FxquantError, match="ends inside tensor a"):
        info.read()


def test_short_reads_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may give fewer bytes than asked for, as the kernel does above 2 GiB."""
    save_file({"a": torch.arange(10)}, tmp_path / "a.safetensors")
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, offset: whole(handle, [buffers[0][:7]], offset))
    assert torch.equal(read_header(tmp_path / "a.safetensors")["a"].read(), torch.arange(10))


# refusing


@pytest.mark.parametrize("cut", [1, 4, 40])
def test_truncated_file(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "t.safetensors"
    save_file({"a": torch.zeros(10), "b": torch.zeros(10)}, file)
    os.truncate(file, file.stat().st_size - cut)
    with pytest.raises(FxquantError, match="truncated or padded"):
        read_header(file)


@pytest.mark.parametrize(
    "content",
    [b"", b"1234567", bytes(8), struct.pack("<Q", 3) + b"{}", struct.pack("<Q", 2**63)],
    ids=["empty", "seven bytes", "no header", "cut header", "endless header"],
)
def test_not_a_whole_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.safetensors").write_bytes(content)
    with pytest.raises(FxquantError, match="not a complete safetensors file"):
        read_header(tmp_path / "t.safetensors")


def test_header_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "HEADER_BYTES", 10)
    with pytest.raises(FxquantError, match="header of 11 bytes, at most 10 are read"):
        read_header(write(tmp_path / "t.safetensors", b"{" + b" " * 9 + b"}"))


@pytest.mark.parametrize(
    "header",
    [b"{'a': 1}", b'{"a"', b"\xff\xfe", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["quotes", "cut", "encoding", "nested", "number"],
)
def test_header_is_not_json(tmp_path: Path, header: bytes) -> None:
    with pytest.raises(FxquantError, match="its header: (not JSON|not valid UTF-8|nested more than)"):
        read_header(write(tmp_path / "t.safetensors", header))


def test_header_is_not_an_object(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not an object"):
        read_header(write(tmp_path / "t.safetensors", [1]))


MALFORMED = {
    "number": 1,
    "null": None,
    "text": "F32",
    "no dtype": {"shape": [1], "data_offsets": [0, 4]},
    "no shape": {"dtype": "F32", "data_offsets": [0, 4]},
    "no offsets": {"dtype": "F32", "shape": [1]},
    "three offsets": entry(offsets=[0, 2, 4]),
    "offsets backwards": entry(shape=[0], offsets=[4, 0]),
    "offset before the data": entry(shape=[2], offsets=[-4, 4]),
    "fractional shape": entry(shape=[1.0]),
    "negative shape": entry(shape=[-1, -1]),
    "shape of text": entry(shape="1"),
    "shape of truth values": entry(shape=[True]),
    "dtype a list": entry(dtype=["F32"]),
    "seventeen dimensions": entry(shape=[1] * 17),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_entry(tmp_path: Path, malformed: Any) -> None:
    with pytest.raises(FxquantError, match="tensor a: malformed header entry"):
        read_header(write(tmp_path / "t.safetensors", {"a": malformed}, bytes(4)))


def test_unknown_dtype_names_those_it_reads(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"tensor a: unsupported dtype F64\. fxquant reads BF16, F16, F32, F8_E4M3"):
        read_header(write(tmp_path / "t.safetensors", {"a": entry(dtype="F64", offsets=[0, 8])}, bytes(8)))


@pytest.mark.parametrize(("shape", "length"), [([3], 4), ([1], 8), ([], 8), ([10**30], 4)])
def test_shape_that_does_not_fill_its_bytes(tmp_path: Path, shape: list[int], length: int) -> None:
    with pytest.raises(FxquantError, match=f"does not fill {length} bytes"):
        read_header(write(tmp_path / "t.safetensors", {"a": entry(shape=shape, offsets=[0, length])}, bytes(length)))


@pytest.mark.parametrize(
    ("ranges", "data", "message"),
    [
        ([(0, 4), (0, 4)], 4, "overlap or leave a gap"),
        ([(0, 4), (8, 12)], 12, "overlap or leave a gap"),
        ([(4, 8)], 8, "overlap or leave a gap"),
        ([(0, 4)], 8, "truncated or padded"),
        ([(0, 4), (4, 8)], 4, "truncated or padded"),
        ([], 1, "truncated or padded"),
    ],
)
def test_ranges_must_cover_the_data(tmp_path: Path, ranges: list[tuple[int, int]], data: int, message: str) -> None:
    header = {f"t{index}": entry(offsets=span) for index, span in enumerate(ranges)}
    with pytest.raises(FxquantError, match=message):
        read_header(write(tmp_path / "t.safetensors", header, bytes(data)))


# writing

LIBRARY = sorted(set(DTYPES) - {"F8_E8M0"})
"""Dtypes that `safetensors.torch.load` knows; its `save_file` knows all."""
ENTRIES = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1).filter(lambda name: name != "__metadata__"),
        st.sampled_from(LIBRARY),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    unique_by=lambda item: item[0],
    max_size=6,
)


@given(ENTRIES)
def test_the_library_reads_what_build_header_describes(
    tmp_path_factory: pytest.TempPathFactory, items: list[tuple[str, str, tuple[int, ...]]]
) -> None:
    items = sorted(items, key=lambda item: -DTYPES[item[1]].itemsize)
    tensors = {name: tensor_of(DTYPES[dtype], shape, seed) for seed, (name, dtype, shape) in enumerate(items)}
    header, offsets = build_header([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
    assert len(header) % 4096 == 0
    assert all(offset % tensor.dtype.itemsize == 0 for offset, tensor in zip(offsets, tensors.values(), strict=True))
    content = header + b"".join(map(as_bytes, tensors.values()))
    assert all(content[o:].startswith(as_bytes(t)) for o, t in zip(offsets, tensors.values(), strict=True))
    file = tmp_path_factory.getbasetemp() / "written.safetensors"
    file.write_bytes(content)
    for read in (load(content), {name: info.read() for name, info in read_header(file).items()}):
        assert {name: (t.dtype, t.shape, as_bytes(t)) for name, t in read.items()} == {
            name: (t.dtype, t.shape, as_bytes(t)) for name, t in tensors.items()
        }


@pytest.mark.parametrize("pad", [8, 64, 4096])
def test_header_is_padded_and_byte_stable(pad: int) -> None:
    entries = [("b", torch.float32, (2, 3)), ("ä", torch.int8, (5,))]
    header, offsets = build_header(entries, pad)
    assert build_header(list(entries), pad) == (header, offsets)
    assert (len(header) % pad, offsets) == (0, [len(header), len(header) + 24])
    assert header[8:].rstrip(b" ").decode() == (
        '{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"ä":{"dtype":"I8","shape":[5],"data_offsets":[24,29]}}'
    )


SHAPES = st.lists(st.integers(0, 300), max_size=3).map(tuple)


@given(st.dictionaries(st.text(max_size=20), st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES)))
def test_length_of_a_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    header, offsets = build_header([(name, dtype, shape) for name, (dtype, shape) in tensors.items()])
    text = json.loads(header[8:])
    assert text.pop("__metadata__") == {"format": "pt"} and list(text) == list(tensors)
    assert [len(header) + text[name]["data_offsets"][0] for name in tensors] == offsets
    forms = [(*form, 1) for form in tensors.values()]
    ends = [text[name]["data_offsets"][1] for name in tensors]
    assert header_length(quoted_size(tensors), forms, ends) == len(header)
