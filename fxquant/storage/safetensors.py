"""Safetensors headers: read and validated, or written byte-stable.

Layout: u64 little-endian header length, JSON header padded with spaces, tensor bytes without gaps.
"""

import json
import math
import os
import struct
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fxquant.errors import FxquantError, StoppedError
from fxquant.inputs.json_file import parse_json, uncollected
from fxquant.inputs.limits import DIMENSIONS, HEADER_BYTES, NAME_LENGTH, TENSORS

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LFS = b"version https://git-lfs"
AGAIN = "Download or copy the file again."
quoted = json.encoder.encode_basestring


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of one tensor: absolute byte range [start, end) of `file`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def parts(self) -> tuple["TensorInfo", ...]:
        """The file ranges that hold its bytes: itself."""
        return (self,)

    def ranges(self, offset: int, length: int) -> Iterator[tuple["TensorInfo", int, int]]:
        """Location of `length` bytes from `offset` within the tensor: (part, offset in it, bytes) each."""
        yield self, offset, length

    def read(self) -> torch.Tensor:
        """Read the whole tensor."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.read_bytes(0, self.nbytes), dtype=self.dtype).view(self.shape)

    def read_bytes(self, offset: int, length: int) -> bytearray:
        """Read `length` bytes from `offset` within the tensor."""
        data = bytearray(length)
        handle = os.open(self.file, os.O_RDONLY)
        try:
            pread(handle, memoryview(data), self.start + offset, self)
        finally:
            os.close(handle)
        return data


def pread(handle: int, view: memoryview, start: int, tensor: TensorInfo) -> None:
    """Fill `view` from byte `start` of the open file of `tensor`. Raises StoppedError on failure."""
    done = 0
    while done < len(view):
        try:
            part = os.preadv(handle, [view[done:]], start + done)
        except OSError as error:
            fact = f"tensor {tensor.name} cannot be read: {error.strerror}."
            raise StoppedError(tensor.file, fact, "Repair the disk, or copy the file again.") from None
        if not part:
            raise StoppedError(tensor.file, f"file ends inside tensor {tensor.name}.", AGAIN)
        done += part


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of `file`, sorted by name. Raises FxquantError unless the header describes the file exactly.

    Limits: `HEADER_BYTES`, `TENSORS` tensors of up to `DIMENSIONS` dimensions; names must be printable.
    """
    header, length, size = _parsed(file)
    header.pop("__metadata__", None)
    if len(header) > TENSORS:
        raise FxquantError(file, f"{len(header):,} tensors, at most {TENSORS:,} are read.", "Split it into shards.")
    check_names(file, header)
    with uncollected():
        infos = [_entry(file, name, header[name], 8 + length) for name in sorted(header)]
    _check_ranges(file, infos, 8 + length, size)
    return {info.name: info for info in infos}


def _parsed(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header of `file`, the header's length and the file's size in bytes."""
    whole = header_bytes(file)
    size, length = file.stat().st_size, struct.unpack("<Q", whole[:8])[0] if len(whole) >= 8 else -1
    if HEADER_BYTES < length <= size - 8:
        raise FxquantError(
            file, f"header of {length:,} bytes, at most {HEADER_BYTES:,} are read.", "Split it into shards."
        )
    if whole.startswith(LFS):
        raise FxquantError(file, "a Git LFS pointer, not the file itself.", "Fetch the file:\ngit lfs pull")
    if length != len(whole) - 8 or length < 2:
        header = f", header of {length:,}" if length >= 0 else ""
        raise FxquantError(file, f"not a complete safetensors file: {size:,} bytes{header}.", AGAIN)
    if whole.count(b'"data_offsets"') > TENSORS:  # before parsing spends memory on them
        raise FxquantError(file, f"more than {TENSORS:,} tensors, the limit of one file.", "Split it into shards.")
    try:
        header = parse_json(whole[8:], file)
    except FxquantError as error:
        raise FxquantError(file, f"its header: {error.fact}", AGAIN) from None
    if not isinstance(header, dict):
        raise FxquantError(file, "its header is not an object.", AGAIN)
    return header, length, size


def header_bytes(file: Path) -> bytes:
    """The raw header of `file`, with the 8 length bytes before it; at most `HEADER_BYTES`. Raises StoppedError if it
    cannot be read."""
    try:
        if not file.is_file():  # opening a pipe would block forever
            raise StoppedError(file, "not a regular file." if file.exists() else "is missing.", AGAIN)
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            return prefix + stream.read(min(length, HEADER_BYTES))
    except OSError as error:
        raise StoppedError(file, f"cannot be read: {error.strerror}.", AGAIN) from None


def read_metadata(file: Path) -> dict[str, str]:
    """The header's `__metadata__`, or an empty dict. Does not validate the tensors: `read_header` does."""
    metadata = _parsed(file)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FxquantError(file, "its __metadata__ has values that are not strings.", AGAIN)
    return metadata


def check_names(file: Path, names: Collection[str]) -> None:
    """Raises FxquantError for hostile tensor names: empty, overlong, or with characters that control a terminal."""
    if "".join(names).isprintable() and all(0 < length <= NAME_LENGTH for length in set(map(len, names))):
        return
    for name in names:
        if not 0 < len(name) <= NAME_LENGTH:
            fact = f"a tensor name of {len(name):,} characters, {name[:40]!a}; the limit is {NAME_LENGTH}."
            raise FxquantError(file, fact, "Do not use this file.")
        if not name.isprintable():
            raise FxquantError(file, f"a tensor name with control characters, {name!a}.", "Do not use this file.")


def _entry(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and len(shape) <= DIMENSIONS
        for number in (*shape, start, end):
            whole = whole and type(number) is int and number >= 0
        whole = whole and start <= end
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise FxquantError(file, f"tensor {name}: malformed header entry.", AGAIN)
    if dtype not in DTYPES:
        remedy = f"fxquant reads {', '.join(sorted(DTYPES))}."
        raise FxquantError(file, f"tensor {name}: unsupported dtype {dtype[:40]}.", remedy)
    itemsize = DTYPES[dtype].itemsize
    if math.prod(shape) * itemsize != end - start:
        raise FxquantError(file, f"tensor {name}: {dtype}{list(shape)} does not fill {end - start} bytes.", AGAIN)
    if start == end and math.prod(size or 1 for size in shape) >= 1 << 60:
        raise FxquantError(file, f"tensor {name}: {dtype}{list(shape)} is not a valid empty tensor.", AGAIN)
    return TensorInfo(name, DTYPES[dtype], shape, file, base + start, base + end)


def _check_ranges(file: Path, infos: list[TensorInfo], base: int, size: int) -> None:
    position = base
    for info in sorted(infos, key=lambda info: (info.start, info.end)):
        if info.start != position:
            raise FxquantError(file, f"tensor {info.name}: bytes overlap or leave a gap.", AGAIN)
        position = info.end
    if position != size:
        raise FxquantError(file, f"truncated or padded: the header describes {position} bytes of {size}.", AGAIN)


Entry = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a tensor to store."""
PAD = 4096
METADATA = {"format": "pt"}
OPENING = '{"__metadata__":' + json.dumps(METADATA, separators=(",", ":"))


def build_header(
    entries: Sequence[Entry], pad: int = PAD, metadata: dict[str, str] | None = None
) -> tuple[bytes, list[int]]:
    """Header bytes for tensors stored in this order, and the absolute offset of each tensor.

    Entries in order of descending item size keep every tensor aligned; the header is padded with spaces so that data
    starts at a multiple of `pad` bytes.
    """
    opening = '{"__metadata__":' + json.dumps(METADATA | (metadata or {}), separators=(",", ":"), ensure_ascii=False)
    parts, offsets, position, describe = [opening], [], 0, cache(_described)
    for name, dtype, shape in entries:
        described, length = describe(dtype, shape)
        offsets.append(position)
        parts.append(f",{quoted(name)}:{described}{position},{position + length}]}}")
        position += length
    text = "".join([*parts, "}"]).encode()
    text += b" " * (-(len(text) + 8) % pad)
    return struct.pack("<Q", len(text)) + text, [8 + len(text) + offset for offset in offsets]


def header_length(names: int, forms: Iterable[tuple[torch.dtype, tuple[int, ...], int]], ends: list[int]) -> int:
    """Length in bytes of the header that `build_header` returns, computed without building it.

    `names`: bytes of all names as JSON strings; `forms`: dtype, shape and number of tensors; `ends`: the end of each
    tensor within the data.
    """
    numbers = 2 * _digits(ends) - len(str(ends[-1])) + 1 if ends else 0  # an end is also the next start
    described = sum(len(_described(dtype, shape)[0]) * count for dtype, shape, count in forms)
    length = 8 + len(OPENING) + names + described + numbers + len(ends) * len(",:,]}") + len("}")
    return length + -length % PAD


def quoted_size(names: Collection[str]) -> int:
    """Bytes of all `names` as JSON strings. They are escaped as one string: escaping works character by character."""
    return len(quoted("".join(names)).encode()) - 2 + 2 * len(names)


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, int]:
    """The text of a header entry up to its offsets, and the tensor's size in bytes."""
    sizes = ",".join(map(str, shape))
    text = f'{{"dtype":"{NAMES[dtype]}","shape":[{sizes}],"data_offsets":['
    return text, math.prod(shape) * dtype.itemsize


def _digits(rising: list[int]) -> int:
    """Total number of decimal digits of the sorted numbers `rising`."""
    powers = (10**power for power in range(1, len(str(rising[-1]))))
    return len(rising) + sum(len(rising) - bisect_left(rising, power) for power in powers)
