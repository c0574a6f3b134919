"""Rotation that a description speaks of: the file with its matrix, and that it is a rotation.

The reference tool names it `optional.quarot.rotation_map.global_rotation`; engines take Q from it for draft models.
"""

from pathlib import PurePosixPath

import torch

from fxquant.errors import FxquantError
from fxquant.foreign.found import FoundFolder
from fxquant.lowering.output_folder.rotation_file import TENSOR
from fxquant.storage.safetensors import read_header
from fxquant.verification.report import Check

ROTATED, MAP = "quarot", "rotation_map"
ROWS = 64
"""Rows whose products with all others are looked at."""


def rotation(found: FoundFolder) -> bool:
    """Whether the header says that weights were rotated."""
    optional = found.header.get("optional")
    return isinstance(optional, dict) and ROTATED in optional


def check_rotation(found: FoundFolder, hidden_size: int) -> Check:
    """The file is there, and Q in it is a rotation of the residual stream: Q Q^T = 1."""
    check = Check("rotation", 1)
    place = f"{found.description}: optional.{ROTATED}.{MAP}"
    quarot = found.header["optional"][ROTATED]
    maps = quarot.get(MAP) if isinstance(quarot, dict) else None
    name = maps.get(TENSOR) if isinstance(maps, dict) else None
    if not isinstance(name, str):
        check.expect(False, f"{place}: names no file as {TENSOR}")
        return check
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not (found.path / path).is_file():
        check.expect(False, f"{place}: {TENSOR} {name:.80} is no file of the folder")
        return check
    try:
        info = read_header(found.path / path).get(TENSOR)
    except FxquantError as error:
        check.expect(False, f"{name:.80}: {error.fact}")
        return check
    fits = info is not None and info.dtype.is_floating_point and info.shape == (hidden_size, hidden_size)
    check.expect(fits, f"{name:.80}: {TENSOR} is not [{hidden_size}, {hidden_size}] of floats")
    if info is not None and fits:
        off = _off_by(info.read())
        check.expect(off < 2**-8, f"{name:.80}: {TENSOR} is no rotation: Q Q^T is up to {off:.2g} from the identity")
    return check


def _off_by(matrix: torch.Tensor) -> float:
    """The largest entry of Q Q^T - 1 in some rows; entries of bfloat16 are 2**-9 off, and so is a sum of squares."""
    matrix = matrix.float()
    rows = torch.linspace(0, len(matrix) - 1, min(ROWS, len(matrix))).long()
    product = matrix[rows] @ matrix.T
    product[torch.arange(len(rows)), rows] -= 1
    off = product.abs().max().item()
    return off if off == off else float("inf")  # NaN is no rotation
