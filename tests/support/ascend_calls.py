"""torch.ops.npu on CPU, and what its tests call it with."""

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators import register

register()
npu = torch.ops.npu

UNIT = 2.0**-24
"""Half a step of float32 at 1: one rounding moves a value by at most this fraction."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)


def integer_product(x: Tensor, weight: Tensor) -> list[list[int]]:
    """x [m, k] @ weight [k, n] in Python integers."""
    columns = list(zip(*weight.tolist(), strict=True))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in x.tolist()]


def low_words(scale: Tensor) -> Tensor:
    """float32 → int64 with its bits in the low word."""
    return scale.view(torch.int32).long() & 0xFFFFFFFF


def pack_int4(codes: Tensor) -> Tensor:
    """int8 [..., n] in [-8, 7] → int32 [..., n / 8], lowest n in the lowest bits."""
    words = [
        sum((code & 0xF) << 4 * place for place, code in enumerate(eight)) for eight in codes.reshape(-1, 8).tolist()
    ]
    signed = [word - (1 << 32) if word >> 31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(*codes.shape[:-1], -1)
