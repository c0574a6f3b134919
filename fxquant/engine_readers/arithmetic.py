"""Reader arithmetic: exact, or with every rounding of the device.

Sources: ops-nn (dynamic_quant, ascend_quant), ops-transformer (grouped_matmul, A8W4 MSD), op-plugin (npu_quant_matmul).
"""

from enum import Enum

import torch
from torch import Tensor

U = 2.0**-24
"""Half a step of float32 at 1."""

_UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SMALLEST_HALF_STEP = {torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
_FP19_MASK = -8192  # 0xFFFFE000: sign, 8 bits of exponent, 10 of mantissa

SMALLEST_ROW_MAXIMUM = 1e-30
"""A row below it counts as zero: 127 / m must be finite in float32."""


class Arithmetic(Enum):
    """EXACT: integer sums, stored scales, true division. KERNEL: every rounding of the device."""

    EXACT = "exact"
    KERNEL = "kernel"


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 x [..., k] → int8 `rne(x * (127 / m))`, float32 `m / 127` [..., 1], m the row's largest magnitude.

    npu_dynamic_quant multiplies; it does not divide by the scale. A row of zeros gives zeros and scale 0.
    """
    maximum = x.abs().amax(-1, keepdim=True)
    factor = torch.full_like(maximum, 127.0) / maximum
    factor = torch.where(maximum < SMALLEST_ROW_MAXIMUM, torch.zeros_like(factor), factor)
    return torch.round(x * factor).to(torch.int8), maximum / 127


def round_to_int8(x: Tensor) -> Tensor:
    """`clamp(rne(x), -128, 127)`."""
    return torch.round(x).clamp(-128, 127).to(torch.int8)


def nibbles(x8: Tensor) -> tuple[Tensor, Tensor]:
    """int8 x → float64 hi, lo in [-8, 7] with `x = 16 hi + lo + 8`: `hi = floor(x / 16)`, `lo = (x & 15) - 8`."""
    wide = x8.to(torch.int32)
    return (wide >> 4).double(), ((wide & 15) - 8).double()


def truncate_fp19(scale: Tensor) -> Tensor:
    """float32 with the low 13 mantissa bits cut off: what fixpipe reads of an int64 scale."""
    return (scale.contiguous().view(torch.int32) & _FP19_MASK).view(torch.float32)


def float32_bits(words: Tensor) -> Tensor:
    """float32 of the low words of int64."""
    low = words & 0xFFFFFFFF
    return torch.where(low >= 2**31, low - 2**32, low).to(torch.int32).view(torch.float32)


def half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 bound on `|values - values.to(dtype)|` for rounding to nearest; 0 where `dtype` holds the value.

    A float of p significant bits lies within 2**-p of what it rounds, relatively, and within half the smallest
    subnormal, absolutely (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 2.1).
    """
    if dtype not in _UNIT:
        return torch.zeros_like(values, dtype=torch.float64)
    bound = (_UNIT[dtype] * values.double().abs()).clamp(min=_SMALLEST_HALF_STEP[dtype])
    return torch.where(values.to(dtype).double() == values.double(), 0.0, bound)


NUMBERS = 1 << 20
"""Numbers of a weight that are widened at a time."""


def wide_product(x: Tensor, weight: Tensor) -> Tensor:
    """float64 `x @ weight.T`, x [..., k], a block of rows of the weight [n, k] at a time."""
    result = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float64)
    count = max(1, NUMBERS // max(1, weight.shape[1]))
    for start in range(0, len(weight), count):
        result[..., start : start + count] = x.double() @ weight[start : start + count].double().T
    return result


def magnitudes(x: Tensor, weight: Tensor) -> Tensor:
    """float64 `|x| @ |weight|.T`, x [..., k], weight [n, k]."""
    return wide_product(x.double().abs(), weight.abs())
