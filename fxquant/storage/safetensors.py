"""The safetensors container: validated headers in, byte-stable headers out.

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
    """Where one tensor lies: absolute byte range [start, end) of `file`."""

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
        """Itself: the one place where its bytes lie."""
        return (self,)

    def ranges(self, offset: int, length: int) -> Iterator[tuple["TensorInfo", int, int]]:
        """Where `length` bytes from `offset` within the tensor lie: part, offset in it, bytes."""
        yield self, offset, length

    def read(self) -> torch.Tensor:
        """The whole tensor, by pread."""
        if not self.nbytes:
            return torch.empty(self.shape, dtype=self.dtype)
        return torch.frombuffer(self.read_bytes(0, self.nbytes), dtype=self.dtype).view(self.shape)

    def read_bytes(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` within the tensor."""
        data = bytearray(length)
        handle = os.open(self.file, os.O_RDONLY)
        try:
            pread(handle, memoryview(data), self.start + offset, self)
        finally:
            os.close(handle)
        return data


def pread(handle: int, view: memoryview, start: int, tensor: TensorInfo) -> None:
    """Fill `view` from byte `start` of the open file of `tensor`. Raises StoppedError where it can't."""
    done = 0
    while done < len(view):
        try:
            part = os.preadv(handle, [view[done:]], start + done)
        except OSError as error:
            fact = f"tensor {tensor.name} cannot be read: {error.strerror}."
            raise StoppedError(tensor.file, fact, "Repair the disk, or copy the file again.") from None
        if not part:
            raise StoppedError(tensor.file, f"ends inside tensor {tensor.name}.", AGAIN)
        done += part


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of `file`, sorted by name; refuses headers that do not describe the file exactly.

    A header has at most `HEADER_BYTES`, `TENSORS` tensors of `DIMENSIONS` dimensions, and printable names.
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
    """The header of `file`, its bytes, and the file's."""
    whole = header_bytes(file)
    size, length = file.stat().st_size, struct.unpack("<Q", whole[:8])[0] if len(whole) >= 8 else -1
    if HEADER_BYTES < length <= size - 8:
        raise FxquantError(
            file, f"header of {length:,} bytes, at most {HEADER_BYTES:,} are read.", "Split it into shards."
        )
    if whole.startswith(LFS):
        raise FxquantError(file, "a pointer of Git LFS, not the file itself.", "Fetch it: git lfs pull.")
    if length != len(whole) - 8 or length < 2:
        header = f", header of {length:,}" if length >= 0 else ""
        raise FxquantError(file, f"not a whole safetensors file: {size:,} bytes{header}.", AGAIN)
    if whole.count(b'"data_offsets"') > TENSORS:  # before they are parsed
        raise FxquantError(file, f"more than {TENSORS:,} tensors, at most as many are read.", "Split it into shards.")
    try:
        header = parse_json(whole[8:], file)
    except FxquantError as error:
        raise FxquantError(file, f"its header: {error.fact}", AGAIN) from None
    if not isinstance(header, dict):
        raise FxquantError(file, "its header is not an object.", AGAIN)
    return header, length, size


def header_bytes(file: Path) -> bytes:
    """The header of `file` as it lies there, its length before it; at most `HEADER_BYTES`. Raises StoppedError where
    it can't be read."""
    try:
        if not file.is_file():  # a pipe would wait for ever
            raise StoppedError(file, "no regular file." if file.exists() else "is missing.", AGAIN)
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            return prefix + stream.read(min(length, HEADER_BYTES))
    except OSError as error:
        raise StoppedError(file, f"cannot be read: {error.strerror}.", AGAIN) from None


def read_metadata(file: Path) -> dict[str, str]:
    """The header's `__metadata__`; empty where it has none. `read_header` says whether the file is sound."""
    metadata = _parsed(file)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FxquantError(file, "its __metadata__ is not texts.", AGAIN)
    return metadata


def check_names(file: Path, names: Collection[str]) -> None:
    """Raises FxquantError for the name of a tensor that nobody gave in good faith: empty, endless, or one that would
    steer a terminal."""
    if "".join(names).isprintable() and all(0 < length <= NAME_LENGTH for length in set(map(len, names))):
        return
    for name in names:
        if not 0 < len(name) <= NAME_LENGTH:
            fact = f"a tensor name of {len(name):,} characters, {name[:40]!a}, not of 1 to {NAME_LENGTH}."
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
        raise FxquantError(file, f"tensor {name}: dtype {dtype[:40]}.", remedy)
    itemsize = DTYPES[dtype].itemsize
    if math.prod(shape) * itemsize != end - start:
        raise FxquantError(file, f"tensor {name}: {dtype}{list(shape)} does not fill {end - start} bytes.", AGAIN)
    if start == end and math.prod(size or 1 for size in shape) >= 1 << 60:
        raise FxquantError(file, f"tensor {name}: {dtype}{list(shape)} is no shape of an empty tensor.", AGAIN)
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
    """Header bytes for tensors stored in this order, and each one's absolute offset.

    Order by descending item size keeps every tensor aligned; the header is padded so that data starts at a multiple
    of `pad` bytes.
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
    """Bytes of the header that `build_header` gives, counted without writing it.

    `names`: bytes of all names as JSON strings; `forms`: dtype, shape and how many tensors have them; `ends`: bytes of
    data up to each tensor's end.
    """
    numbers = 2 * _digits(ends) - len(str(ends[-1])) + 1 if ends else 0  # a tensor begins where the last one ended
    described = sum(len(_described(dtype, shape)[0]) * count for dtype, shape, count in forms)
    length = 8 + len(OPENING) + names + described + numbers + len(ends) * len(",:,]}") + len("}")
    return length + -length % PAD


def quoted_size(names: Collection[str]) -> int:
    """Bytes of all `names` as JSON strings: what is escaped is escaped letter by letter."""
    return len(quoted("".join(names)).encode()) - 2 + 2 * len(names)


def _described(dtype: torch.dtype, shape: tuple[int, ...]) -> tuple[str, int]:
    """A header entry up to its offsets, and the tensor's bytes."""
    sizes = ",".join(map(str, shape))
    text = f'{{"dtype":"{NAMES[dtype]}","shape":[{sizes}],"data_offsets":['
    return text, math.prod(shape) * dtype.itemsize


def _digits(rising: list[int]) -> int:
    """Decimal digits of all `rising` numbers together."""
    powers = (10**power for power in range(1, len(str(rising[-1]))))
    return len(rising) + sum(len(rising) - bisect_left(rising, power) for power in powers)
