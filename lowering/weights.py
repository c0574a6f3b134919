"""Fill the planned weight files, one module in memory at a time."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.layout import FileLayout, StoredTensor
from fxquant.progress import Advance
from fxquant.schemes import Recipe, tensor_specs

COPY_BLOCK = 16 << 20
Make = Callable[[Recipe, str], dict[str, Tensor]]
"""Recipe and one of its modules → all tensors of that module, by suffix."""


def write_weights(files: list[FileLayout], checkpoint: Checkpoint, make: Make, folder: Path, advance: Advance) -> None:
    """Write every file of the plan into `folder`: what `make` gives, and kept tensors of `checkpoint`.

    `advance` counts output bytes.
    """
    handles: list[int] = []
    try:
        handles += (_create(folder / file.name, file) for file in files)
        places = {
            tensor.name: (handle, tensor, offset)
            for file, handle in zip(files, handles, strict=True)
            for tensor, offset in zip(file.tensors, file.offsets, strict=True)
        }
        for _, tensor, _ in sorted(places.values(), key=lambda place: place[1].name):
            if tensor.recipe is None:
                _keep(places[tensor.name], checkpoint, advance)
            elif tensor.name == f"{tensor.module}.weight":
                _make(tensor, places, make, advance)
        for handle in handles:
            os.fsync(handle)
    finally:
        for handle in handles:
            os.close(handle)


Place = tuple[int, StoredTensor, int]


def _create(path: Path, file: FileLayout) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise FxquantError(path, f"cannot be made: {error.strerror}.", "Raise --max-shard-size or the limit.") from None
    try:
        getattr(os, "posix_fallocate", _extend)(handle, 0, file.nbytes)
    except OSError as error:
        os.close(handle)
        raise FxquantError(path, f"cannot reserve {file.nbytes:,} bytes: {error.strerror}.", "Free space.") from None
    os.pwrite(handle, file.header, 0)
    return handle


def _extend(handle: int, start: int, length: int) -> None:
    """Where the system cannot reserve space."""
    os.ftruncate(handle, start + length)


def _make(weight: StoredTensor, places: dict[str, Place], make: Make, advance: Advance) -> None:
    """All tensors of one module."""
    assert weight.recipe is not None
    tensors = make(weight.recipe, weight.module)
    for suffix, spec in tensor_specs(weight.recipe).items():
        tensor = tensors[suffix]
        if tensor.dtype is not spec.dtype or tuple(tensor.shape) != spec.shape:
            raise AssertionError(f"{weight.module}.{suffix}: made {tensor.dtype}{list(tensor.shape)}, planned {spec}")
        handle, _, offset = places[f"{weight.module}.{suffix}"]
        _write(handle, tensor_bytes(tensor), offset)
        advance(tensor.nbytes)


def _keep(place: Place, checkpoint: Checkpoint, advance: Advance) -> None:
    """Copy a float tensor by ranges, or decode and convert it where the stored dtype differs."""
    handle, tensor, offset = place
    info = checkpoint.tensors[tensor.name]
    if info.dtype is not tensor.spec.dtype:
        _write(handle, tensor_bytes(checkpoint.read(tensor.name).to(tensor.spec.dtype)), offset)
        advance(tensor.nbytes)
        return
    for start in range(0, info.nbytes, COPY_BLOCK):
        length = min(COPY_BLOCK, info.nbytes - start)
        _write(handle, info.read_bytes(start, length), offset + start)
        advance(length)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Little-endian bytes of a CPU tensor."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def _write(handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)
