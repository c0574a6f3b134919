"""Stored rows: a tensor of the weight files against what it should be, some rows at a time, bit for bit."""

from collections.abc import Iterator

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.runtime.large_matrix import rows_of_a_block
from fxquant.storage.safetensors import TensorInfo
from fxquant.storage.sliced_tensor import SlicedTensor


class StoredRows:
    """Compares a stored tensor with blocks of rows; -0.0 and NaN payloads count.

    same  whether all blocks so far were equal, in dtype and shape too
    """

    def __init__(self, stored: TensorInfo | SlicedTensor) -> None:
        self._stored, self._rows, self.same = stored, 0, True
        self._different, self._first, self._shape = 0, "", ""

    def add(self, expected: Tensor, start: int | None = None) -> None:
        """The next rows, or those from `start` on."""
        start = self._rows if start is None else start
        self._rows = start + len(expected) if expected.ndim else 1
        shape = self._stored.shape
        if expected.dtype is not self._stored.dtype or tuple(expected.shape[1:]) != shape[1:]:
            self._shape = f"{expected.dtype}[{', '.join(map(str, ('…', *expected.shape[1:])))}]"
        elif shape and self._rows > shape[0]:
            self._shape = f"{expected.dtype} of {self._rows} rows or more"
        if self._shape:
            self.same = False
            return
        offset = start * expected.nbytes // max(1, len(expected)) if expected.ndim else 0
        data = self._stored.read_bytes(offset, expected.nbytes)
        stored = torch.frombuffer(data, dtype=expected.dtype).view(expected.shape) if data else expected
        if not torch.equal(_bits(stored), _bits(expected)):
            self.same = False
            self._count(stored, expected, start)

    def _count(self, stored: Tensor, expected: Tensor, start: int) -> None:
        different = (stored != expected).nonzero()
        if len(different) and not self._different:
            place = tuple(different[0].tolist())
            shown = [start + place[0], *place[1:]] if place else []
            self._first = f"{shown}: {stored[place].item()}, not {expected[place].item()}"
        self._different += len(different)

    def fact(self) -> str:
        """The first element that differs."""
        if self._shape:
            return f"{self._stored.dtype}{list(self._stored.shape)}, expected {self._shape}"
        if not self._different:
            return "differs in the sign of a zero or in a NaN"
        return f"{self._different} elements differ, first at {self._first}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def source_rows(source: Checkpoint, name: str) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows) of consecutive blocks of a tensor of the source: of all of it, where a rotation mixes rows."""
    shape = source.tensors[name].shape
    if len(shape) < 2 or source.transforms.mixes_rows(name):
        yield 0, source.read(name)
        return
    count = rows_of_a_block(torch.Size(shape[1:]).numel())
    for start in range(0, shape[0], count):
        yield start, source.read_rows(name, start, min(start + count, shape[0]))
