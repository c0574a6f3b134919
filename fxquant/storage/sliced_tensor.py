"""Sliced tensors: tensors that lie in a larger stored one in runs of bytes, as the rows of one expert among others'."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.storage.safetensors import TensorInfo


@dataclass(frozen=True)
class Runs:
    """Bytes of a tensor in runs: `run` bytes from byte `start` of the stack, and again every `stride` bytes.

    stack  its name, and `size`: its bytes
    """

    stack: str
    size: int
    start: int
    run: int
    stride: int

    def ranges(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        """Bytes `offset` … `offset + length` of the tensor: (byte in the stack, number of bytes) of each run."""
        while length:
            index, within = divmod(offset, self.run)
            size = min(self.run - within, length)
            yield self.start + index * self.stride + within, size
            offset, length = offset + size, length - size


@dataclass(frozen=True)
class SlicedTensor:
    """One expert's tensor in a stored tensor of all experts, `stack`. Reads like a TensorInfo."""

    name: str
    shape: tuple[int, ...]
    stack: TensorInfo
    runs: Runs

    @property
    def dtype(self) -> torch.dtype:
        return self.stack.dtype

    @property
    def file(self) -> Path:
        return self.stack.file

    @property
    def start(self) -> int:
        """First byte of the stack in its file; `runs` count from there."""
        return self.stack.start

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """The file range that holds its bytes: that of the stack."""
        return (self.stack,)

    def ranges(self, offset: int, length: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Location of `length` bytes from `offset` within the tensor: (stack, offset in it, bytes) of each run."""
        return ((self.stack, start, size) for start, size in self.runs.ranges(offset, length))

    def read_bytes(self, offset: int, length: int) -> bytearray:
        """`length` bytes from `offset` within the tensor, run by run."""
        data = bytearray()
        for start, size in self.runs.ranges(offset, length):
            data += self.stack.read_bytes(start, size)
        return data

    def read(self) -> Tensor:
        """Read the whole tensor, and what lies between its runs."""
        count = self.nbytes // self.runs.run
        data = self.stack.read_bytes(self.runs.start, (count - 1) * self.runs.stride + self.runs.run)
        whole = torch.frombuffer(data, dtype=torch.uint8)
        own = whole.as_strided((count, self.runs.run), (self.runs.stride, 1)).contiguous()
        return own.flatten().view(self.dtype).view(self.shape)
