"""Token id files: .npy and one-tensor safetensors, read without pickle and with all sizes checked."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.inputs.limits import TOKEN_ID_BYTES
from fxquant.storage.safetensors import read_header

REMEDY = "Token ids are int64 [batches, length], in a .npy file or as the only tensor of a .safetensors file."
NPY_HEADER_BYTES = 10_000
"""numpy's own limit for untrusted headers."""


def read_token_ids(file: Path, checkpoint: Checkpoint) -> Tensor:
    """Token ids int64 [batches, length], all in the model's vocabulary. Raises FxquantError for anything else."""
    ids = _of_npy(file) if file.suffix == ".npy" else token_ids_from(file)
    if ids.dtype is not torch.int64 or ids.ndim != 2 or not ids.numel():
        raise FxquantError(file, f"{ids.dtype}{list(ids.shape)}.", REMEDY)
    check_vocabulary(file, [ids], checkpoint)
    return ids


def token_ids_from(file: Path) -> Tensor:
    """The single tensor of a .safetensors file of token ids."""
    infos = list(read_header(file).values())
    if len(infos) != 1:
        raise FxquantError(file, f"holds {len(infos)} tensors.", "It must hold one int64 tensor [batches, length].")
    _check_size(file, infos[0].nbytes)
    return infos[0].read()


def check_vocabulary(file: Path, batches: Sequence[Tensor], checkpoint: Checkpoint) -> None:
    """Raises FxquantError for ids outside the model's vocabulary."""
    size = checkpoint.config.get("vocab_size", 0)
    low, high = min(int(ids.min()) for ids in batches), max(int(ids.max()) for ids in batches)
    if low < 0 or high >= size:
        fact = f"token ids {low} … {high}, but the vocabulary has {size} tokens."
        raise FxquantError(file, fact, "Tokenize with this model's tokenizer.")


def _of_npy(file: Path) -> Tensor:
    """An array as written by `numpy.save`; the file must have exactly the bytes that its header declares."""
    with file.open("rb") as stream:
        try:
            version = npy.read_magic(stream)
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
            shape, by_columns, dtype = read(stream, max_header_size=NPY_HEADER_BYTES)
        except Exception as error:  # numpy parses the header as Python source: many error types
            raise FxquantError(file, f"its header is not that of an array{_reason(error)}.", REMEDY) from None
        whole = len(shape) == 2 and all(type(size) is int and size >= 0 for size in shape)
        if dtype != np.dtype("<i8") or not whole:
            order = "" if dtype.isnative else " of another byte order"
            raise FxquantError(file, f"torch.{dtype.name[:40]}{str(list(shape))[:80]}{order}.", REMEDY)
        expected, held = math.prod(shape) * dtype.itemsize, file.stat().st_size - stream.tell()
        if expected != held:
            fact = f"its header declares {str(list(shape))[:80]}, {str(expected)[:40]} bytes; the file has {held:,}."
            raise FxquantError(file, fact, REMEDY)
        _check_size(file, held)
        ids = np.fromfile(stream, dtype, expected // dtype.itemsize)
    return torch.from_numpy(ids.reshape(shape, order="F" if by_columns else "C"))


def _check_size(file: Path, size: int) -> None:
    if size > TOKEN_ID_BYTES:
        raise FxquantError(file, f"{size:,} bytes of ids, at most {TOKEN_ID_BYTES:,} are read.", "Use fewer ids.")


def _reason(error: Exception) -> str:
    """numpy's own message; messages of Python's parser would not help a user."""
    return ": " + " ".join(str(error).split())[:120].rstrip(".") if isinstance(error, ValueError) else ""
