"""Rotation file: the matrix by which the residual stream of an output is rotated, for models that read that stream.

The reference tool writes it so, and vllm-ascend undoes the rotation with it for draft models that bring no rotated
weights of their own: `optional.quarot.rotation_map.global_rotation` of the description is the file's path, and Q its
one tensor, float32 [n, n], with which the embedding E became E Q.
Source: msModelSlim save/ascendv1.py; vllm-ascend patch/worker/patch_draft_quarot.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxquant.storage.safetensors import build_header
from fxquant.transforms.hadamard import rotated

FILE = "optional/quarot.safetensors"
TENSOR = "global_rotation"
ROWS = 256
"""Rows made and written at a time."""


def rotation_header(size: int) -> dict[str, Any]:
    """Keys of the description for a stream of that many features; none for 0, without a rotation."""
    return {"optional": {"quarot": {"rotation_map": {TENSOR: FILE}}}} if size else {}


def rotation_rows(size: int) -> Iterator[Tensor]:
    """Q, some rows at a time."""
    for start in range(0, size, ROWS):
        rows = torch.zeros(min(ROWS, size - start), size)
        rows.view(-1)[start :: size + 1] = 1
        yield rotated(rows)


def rotation_file_size(size: int) -> int:
    """Bytes of the file."""
    return len(_header(size)) + 4 * size * size


def write_rotation(folder: Path, size: int) -> None:
    """Write the file into its own folder inside `folder`."""
    path = folder / FILE
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(_header(size))
        for rows in rotation_rows(size):
            file.write(rows.numpy().tobytes())


def _header(size: int) -> bytes:
    return build_header([(TENSOR, torch.float32, (size, size))])[0]
