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

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST_HEADER = 200_000_000
AGAIN = "Download or copy the file again."
quoted = json.encoder.encode_basestring


@dataclass(frozen=True)
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
    """Every tensor of `file`, sorted by name; refuses headers that do not describe the file exactly."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
        if not 2 <= length <= min(size - 8, LARGEST_HEADER):
            raise FxquantError(file, f"not a whole safetensors file: {size} bytes, header of {length}.", AGAIN)
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise FxquantError(file, f"its header is not JSON: {error}.", AGAIN) from None
    if not isinstance(header, dict):
        raise FxquantError(file, "its header is not an object.", AGAIN)
    header.pop("__metadata__", None)
    infos = [_entry(file, name, entry, 8 + length) for name, entry in sorted(header.items())]
    _check_ranges(file, infos, 8 + length, size)
    return {info.name: info for info in infos}


def header_bytes(file: Path) -> bytes:
    """The header of `file` as it lies there, its length before it."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        return prefix + stream.read(min(length, LARGEST_HEADER))


def read_metadata(file: Path) -> dict[str, str]:
    """The header's `__metadata__`; empty where it has none. `read_header` says whether the file is sound."""
    metadata = json.loads(header_bytes(file)[8:]).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _entry(file: Path, name: str, entry: Any, base: int) -> TensorInfo:
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, start, end)) and start <= end
        whole = whole and isinstance(dtype, str)
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole:
        raise FxquantError(file, f"tensor {name}: malformed header entry.", AGAIN)
    if dtype not in DTYPES:
        raise FxquantError(file, f"tensor {name}: dtype {dtype}.", f"fxquant reads {', '.join(sorted(DTYPES))}.")
    if math.prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise FxquantError(file, f"tensor {name}: {dtype}{list(shape)} does not fill {end - start} bytes.", AGAIN)
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
