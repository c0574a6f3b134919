"""Producer of units: their bytes, piece by piece, from checkpoint rows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, decode_fp8
from fxquant.checkpoint.model_parallel_parts import HeldTensor, SourceTensor
from fxquant.checkpoint.stamped_bytes import FileStamp, StampedBytes, Stamps
from fxquant.kernels.version import KERNEL_VERSION
from fxquant.lowering.weights.unit import Unit
from fxquant.program.program_file import recipe_arguments
from fxquant.runtime.weight_providers import Codes, codes_of
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe
from fxquant.storage.hashing import hash_text
from fxquant.storage.safetensors import NAMES, TensorInfo

if TYPE_CHECKING:
    from fxquant.kernels.source_rows import SourceRows

BLOCK_BYTES = 2 << 20
"""Source bytes in memory per worker, or two rows if these are longer: few enough to stay in a core's cache while
they are decoded, quantized, packed, hashed and written."""


class Producer(Protocol):
    """The source of units' bytes. Pickled for Ray workers."""

    def pieces(self, unit: Unit) -> Iterator[tuple[str, memoryview]]:
        """(suffix, bytes) of every tensor of the unit, in order within a tensor; a piece is valid until the next."""

    def key(self, unit: Unit) -> str:
        """Hash of everything that the unit's bytes depend on, 32 hex digits; known without reading a weight."""

    def stamps_of(self, unit: Unit) -> list[FileStamp]:
        """Stamps of the files that the unit is made from."""

    def prefetch(self, unit: Unit) -> None:
        """Ask the system to read the unit's source bytes ahead."""


class CheckpointProducer:
    """Units quantized or copied from a checkpoint whose files have these stamps, with `solved` codes if any."""

    def __init__(self, checkpoint: Checkpoint, stamps: Stamps, solved: Codes | None = None) -> None:
        self._checkpoint, self._stamps, self._solved = checkpoint, stamps, solved
        self._files = StampedBytes(stamps)

    def pieces(self, unit: Unit) -> Iterator[tuple[str, memoryview]]:
        return self._float_pieces(unit) if unit.recipe is None else self._quantized_pieces(unit, unit.recipe)

    def key(self, unit: Unit) -> str:
        document: list[Any] = [KERNEL_VERSION, NAMES[self._checkpoint.dtype], list(self._checkpoint.block)]
        if unit.recipe is None:
            assert unit.float_tensor is not None
            document.append(NAMES[unit.float_tensor.spec.dtype])
        else:
            document.append(recipe_arguments(unit.recipe))
        parts = ((self._stamps[part.file], part.start) for part in self._parts(unit))
        document += ([stamp.header, stamp.size, start] for stamp, start in parts)  # no mtime: a copy has another one
        changed = self._checkpoint.transforms.key(_source_names(unit))
        document += [] if changed is None else [changed]
        if self._solved is not None and unit.recipe is not None and unit.recipe.algorithm.from_inputs:
            document.append(self._solved.digest(unit.name))
        return hash_text(json.dumps(document))

    def stamps_of(self, unit: Unit) -> list[FileStamp]:
        return [self._stamps[part.file] for part in self._parts(unit)]

    def prefetch(self, unit: Unit) -> None:
        for part in self._parts(unit):
            self._files.prefetch(part)

    def _parts(self, unit: Unit) -> list[TensorInfo]:
        """The stored tensors that the unit is made from: weight, block scales, bias."""
        names = _source_names(unit)
        tensors = [self._checkpoint.tensors[name] for name in names]
        tensors += [self._checkpoint.scales[name] for name in names if name in self._checkpoint.scales]
        return [part for tensor in tensors for part in tensor.parts]

    def _float_pieces(self, unit: Unit) -> Iterator[tuple[str, memoryview]]:
        """A float tensor, unchanged if the stored one is the same, else decoded, transformed and converted."""
        assert unit.float_tensor is not None
        tensor, dtype = self._checkpoint.tensors[unit.name], unit.float_tensor.spec.dtype
        transforms = self._checkpoint.transforms
        if unit.name in transforms.tensors or isinstance(tensor, HeldTensor):
            yield "", tensor_bytes(transforms.tensors[unit.name].to(dtype))
            return
        buffer = np.empty(min(BLOCK_BYTES, tensor.nbytes), np.uint8)
        if tensor.dtype is dtype and not transforms.changes(unit.name):
            for start in range(0, tensor.nbytes, BLOCK_BYTES):
                view = buffer.data[: min(BLOCK_BYTES, tensor.nbytes - start)]
                self._files.read_into(tensor, start, view)
                yield "", view
            return
        for first, wide in self._decoded_blocks(unit.name):
            yield "", tensor_bytes(transforms.apply(unit.name, wide, tensor.shape[0], first).to(dtype))

    def _quantized_pieces(self, unit: Unit, recipe: Recipe) -> Iterator[tuple[str, memoryview]]:
        from fxquant.kernels.module_tensors import ModuleMaker  # here: keys need no numba

        name = unit.tensor_name("weight")
        maker = ModuleMaker(recipe, name, self._bias(unit.name) if recipe.bias else None)
        codes = codes_of(recipe, unit.name, self._solved)
        rotated = name in self._checkpoint.transforms.rotations
        for source in self._rotated_rows(name) if rotated else self._stored_rows(name):
            rows_codes = None if codes is None else codes[source.start : source.start + source.rows]
            for suffix, tensor in maker.rows(source, rows_codes).items():
                yield suffix, tensor_bytes(tensor)
        for suffix, tensor in maker.rest().items():
            yield suffix, tensor_bytes(tensor)

    def _stored_rows(self, name: str) -> Iterator["SourceRows"]:
        """Rows as stored in the file, with the scales by which kernels decode and smooth them."""
        from fxquant.kernels.source_rows import SourceRows

        weight, transforms = self._checkpoint.tensors[name], self._checkpoint.transforms
        scales = self._scales(name) if name in self._checkpoint.scales else None
        transforms.check(name, weight.shape)
        columns, divided = _array(transforms.column_scale(name)), _array(transforms.row_scale(name, weight.shape[0]))
        model_dtype = self._checkpoint.stored_dtype(name)
        for first, rows in self._row_blocks(weight):
            form = (weight.dtype, weight.shape[1], first, model_dtype, scales, self._checkpoint.block)
            yield SourceRows(rows, *form, columns, divided)

    def _rotated_rows(self, name: str) -> Iterator["SourceRows"]:
        """Rotated and smoothed rows, in the model's dtype."""
        from fxquant.kernels.source_rows import rows_of

        transforms, (count, width) = self._checkpoint.transforms, self._checkpoint.tensors[name].shape
        for first, wide in self._decoded_blocks(name):
            rotated = transforms.apply(name, wide, count, first)
            step = max(2, BLOCK_BYTES // (width * rotated.itemsize) // 2 * 2)  # even: two int4 rows share a byte
            for start in range(0, len(rotated), step):
                yield replace(rows_of(rotated[start : start + step]), start=first + start)

    def _decoded_blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """(first row, rows), FP8 decoded to the model's dtype; all rows at once if a rotation mixes them."""
        tensor, block = self._checkpoint.tensors[name], self._checkpoint.block
        scales = torch.from_numpy(self._scales(name)) if name in self._checkpoint.scales else None
        whole = None
        if self._checkpoint.transforms.mixes_rows(name):
            whole = torch.empty(tensor.shape, dtype=self._checkpoint.stored_dtype(name))
        for first, rows in self._row_blocks(tensor):
            wide = torch.from_numpy(rows).view(tensor.dtype).view(-1, *tensor.shape[1:])
            if scales is not None:
                wide = decode_fp8(wide, scales[first // block[0] :], block).to(self._checkpoint.dtype)
            if whole is None:
                yield first, wide
            else:
                whole[first : first + len(wide)] = wide
        if whole is not None:
            yield 0, whole

    def _row_blocks(self, tensor: SourceTensor) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, bytes of the rows as uint8) of consecutive blocks; each starts at a row of block scales."""
        # an even number of rows, as two int4 rows share a byte
        rows, step = tensor.shape[0], self._checkpoint.block[0] + self._checkpoint.block[0] % 2
        width = tensor.nbytes // rows
        step *= max(1, BLOCK_BYTES // (step * width))
        buffer = np.empty(min(step, rows) * width, np.uint8)
        for first in range(0, rows, step):
            block = buffer[: min(step, rows - first) * width]
            self._files.read_into(tensor, first * width, block.data)
            yield first, block

    def _scales(self, name: str) -> np.ndarray:
        """float32 [blocks of rows, blocks of columns]: exactly the values of the stored scales."""
        scale = self._checkpoint.scales[name]
        return torch.frombuffer(self._files.read(scale), dtype=scale.dtype).view(scale.shape).float().numpy()

    def _bias(self, module: str) -> Tensor:
        name = tensor_name(module, "bias")
        tensor, changed = self._checkpoint.tensors[name], self._checkpoint.transforms.tensors.get(name)
        if changed is not None or isinstance(tensor, HeldTensor):
            return self._checkpoint.transforms.tensors[name]
        return torch.frombuffer(self._files.read(tensor), dtype=tensor.dtype)


def _source_names(unit: Unit) -> list[str]:
    """Checkpoint tensors that the unit is made from."""
    if unit.recipe is None:
        return [unit.name]
    return [unit.tensor_name(role) for role in unit.recipe.source_roles]


def _array(scale: Tensor | None) -> np.ndarray | None:
    return None if scale is None else scale.numpy()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a CPU tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
