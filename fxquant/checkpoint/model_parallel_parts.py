"""Model-parallel checkpoints, `model{i}-mp{n}.safetensors`: tensors split over n files, joined back.

DeepSeek's inference code writes them. A routed expert is whole in one file; a tensor with a split dimension is cut into
n equal parts along it; every other tensor is repeated in all files.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fxquant.checkpoint.tensor_names import is_routed_expert, official_tensors, split_dimension
from fxquant.errors import FxquantError
from fxquant.storage.safetensors import TensorInfo, read_header
from fxquant.storage.sliced_tensor import SlicedTensor

PART = re.compile(r"model[0-9]+-mp([0-9]+)\.safetensors")
AGAIN = "Convert or copy the checkpoint again."


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor in parts of equal shape and dtype, concatenated along `dim` in order. Reads like a TensorInfo."""

    name: str
    parts: tuple[TensorInfo, ...]
    dim: int

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        part = self.parts[0].shape
        return (*part[: self.dim], part[self.dim] * len(self.parts), *part[self.dim + 1 :])

    @property
    def file(self) -> Path:
        """The file of the first part."""
        return self.parts[0].file

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def read(self) -> torch.Tensor:
        """Read the whole tensor; memory peaks at the tensor and one part."""
        joined = torch.empty(self.shape, dtype=self.dtype)
        for place, part in zip(joined.tensor_split(len(self.parts), self.dim), self.parts, strict=True):
            place.copy_(part.read())
        return joined

    def ranges(self, offset: int, length: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Location of `length` bytes from `offset` within the joined tensor: runs of the parts in turn."""
        run = math.prod(self.parts[0].shape[self.dim :]) * self.dtype.itemsize
        done = 0  # along a dimension above 0 the parts alternate: one run of each per index of the leading dimensions
        while done < length:
            index, start = divmod(offset + done, run)
            row, part = divmod(index, len(self.parts))
            size = min(run - start, length - done)
            yield self.parts[part], row * run + start, size
            done += size

    def read_bytes(self, offset: int, length: int) -> bytearray:
        """Read `length` bytes from `offset` within the joined tensor."""
        data = bytearray()
        for part, start, size in self.ranges(offset, length):
            data += part.read_bytes(start, size)
        return data


HELD = Path("transforms")
"""The `file` of tensors held in memory."""


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that smoothing added to a checkpoint: held in memory, read like a stored one."""

    name: str
    value: torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.value.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    @property
    def nbytes(self) -> int:
        return self.value.nbytes

    @property
    def parts(self) -> tuple[()]:
        """None: it is not stored in a file."""
        return ()

    @property
    def file(self) -> Path:
        return HELD

    def read(self) -> torch.Tensor:
        """The tensor itself."""
        return self.value

    def ranges(self, offset: int, length: int) -> Iterator[tuple[TensorInfo, int, int]]:
        """Raises TypeError: it is not stored in a file."""
        raise TypeError(f"{self.name} is not stored in a file")


SourceTensor = TensorInfo | JoinedTensor | SlicedTensor | HeldTensor


def part_files(folder: Path) -> list[Path]:
    """The n parts in `folder`, in order, or an empty list. Raises FxquantError if only some of them are there."""
    names = {file.name for file in folder.glob("*.safetensors")}
    counts = [int(match[1]) for name in names if (match := PART.fullmatch(name))]
    if not counts:
        return []
    files, count = [], max(counts)  # parts of another conversion may be mixed in: they are refused below
    for index in range(count):
        files.append(folder / f"model{index}-mp{count}.safetensors")
        if files[-1].name not in names:
            raise FxquantError(files[-1], f"missing: the checkpoint has {count} parts.", AGAIN)
    for name in sorted(names - {file.name for file in files}):
        raise FxquantError(folder / name, f"is not one of the {count} parts beside it.", "Keep one conversion only.")
    return files


def join_parts(files: list[Path]) -> dict[str, SourceTensor]:
    """Every tensor of the model by official name, sorted, from headers alone. Raises FxquantError."""
    parts: dict[str, list[TensorInfo]] = {}
    for file in files:
        for name, info in official_tensors(read_header(file)).items():
            parts.setdefault(name, []).append(info)
    joined: dict[str, SourceTensor] = {}
    for name, holders in sorted(parts.items()):
        _check_holders(name, holders, files)
        dim = split_dimension(name)
        # a vector has no dimension 1: beside a weight split along it, it is repeated
        if len(holders) > 1 and dim is not None and dim < len(holders[0].shape):
            joined[name] = JoinedTensor(name, tuple(holders), dim)
        else:
            joined[name] = holders[0]
    return joined


def _check_holders(name: str, holders: list[TensorInfo], files: list[Path]) -> None:
    """Raises FxquantError unless a routed expert is in one file, any other tensor in all with one shape and dtype."""
    first, last = holders[0], holders[-1]
    if is_routed_expert(name):
        if len(holders) > 1:
            raise FxquantError(last.file, f"tensor {name} is also in {first.file.name}.", AGAIN)
        return
    for file in sorted(set(files) - {info.file for info in holders}):
        raise FxquantError(file, f"tensor {name} of {first.file.name} is missing.", AGAIN)
    for info in holders:
        if (info.dtype, info.shape) != (first.dtype, first.shape):
            fact = f"tensor {name} is {info.dtype}{list(info.shape)}, but {first.dtype}{list(first.shape)} in part 0."
            raise FxquantError(info.file, fact, AGAIN)
