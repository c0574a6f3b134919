"""Symmetric weight quantization, exact in float32. Rows of zeros get scale 0 and integers 0, never NaN."""

import torch
from torch import Tensor

INT8_MAXIMUM = 127
INT4_MAXIMUM = 7
TWO_LEVEL_MAXIMUM = INT4_MAXIMUM * 17
"""119: with integer group scales up to 17, `q4 * second` of the two-level form stays within int8."""


def quantize_int8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k], float32 scale [n, 1]: `s = max|W| / 127`, `q = clamp(rne(W / s), -128, 127)`.

    s is rounded to `scale_dtype` before W is divided by it; the quotient is that of float32.
    """
    scale = _row_scale(weight, INT8_MAXIMUM, scale_dtype)
    return _round(weight, scale, -128, 127), scale


def quantize_int4_per_channel(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k] in [-8, 7], float32 scale [n, 1]: `s = max|W| / 7`, rounded to `scale_dtype`."""
    scale = _row_scale(weight, INT4_MAXIMUM, scale_dtype)
    return _round(weight, scale, -8, 7), scale


def quantize_int4_two_level(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k] in [-8, 7], scale float32 [n, 1], second scale float32 [n, G] of integers 1 … 17.

    s = max|W| / 119; q8 = clamp(rne(W / s), -119, 119), a clamp that only a rounded subnormal s reaches;
    second = max(1, rne(max|q8| over the group / 7)); q4 = clamp(rne(q8 / second), -8, 7).
    `q4 * second * s` approximates W. A progressive scheme as in QServe (Lin et al. 2024, arXiv:2405.04532).
    """
    scale = _row_scale(weight, TWO_LEVEL_MAXIMUM)
    groups = _round(weight, scale, -TWO_LEVEL_MAXIMUM, TWO_LEVEL_MAXIMUM).float().unflatten(1, (-1, group_size))
    second = torch.round(groups.abs().amax(-1) / INT4_MAXIMUM).clamp(min=1)
    q4 = torch.round(groups / second.unsqueeze(-1)).clamp(-8, 7)
    return q4.flatten(1).to(torch.int8), scale, second


def pack_int4(q4: Tensor) -> Tensor:
    """int8 [n, k] in [-8, 7] → int8 [n/2, k]: row 2i in the low nibble, row 2i + 1 in the high one."""
    return (q4[0::2] & 0xF) | (q4[1::2] << 4)


def scale_bias(q4: Tensor, scale: Tensor, second: Tensor | None, chunks: int) -> Tensor:
    """float32 [n, chunks]: `8 * scale * sum of q4 * second` over each of `chunks` equal runs of k.

    Integer kernels split an int8 activation into two signed nibbles, `x = 16 hi + lo + 8`; this is what the 8 adds.
    With a second scale, the engines' reference rounds `scale` to bfloat16 first; the sum itself is exact.
    """
    codes = q4.to(torch.int32)
    if second is not None:
        codes = codes * second.to(torch.int32).repeat_interleave(q4.shape[1] // second.shape[1], 1)
        scale = scale.bfloat16()
    sums = codes.unflatten(1, (chunks, -1)).sum(-1)
    return (8 * scale.double() * sums.double()).float()


def _row_scale(weight: Tensor, maximum: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (weight.abs().amax(1, keepdim=True) / maximum).to(dtype).float()


def _round(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    """`clamp(rne(W / s))`, by true division; where the scale is zero the row is, and stays, zero."""
    return torch.round(weight / torch.where(scale > 0, scale, 1)).clamp_(low, high).to(torch.int8)
