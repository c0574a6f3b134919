"""Packed int4 shard: one projection on one rank, by the A8W4 grouped matmul.

The kernel multiplies nibbles: an int8 activation is `x = 16 hi + lo + 8`, and the part of the 8 comes from
scale_bias, added before the per-token scale. Source: ops-transformer, grouped_matmul A8W4 MSD.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import U, half_step, nibbles, truncate_fp19
from fxquant.engine_readers.int4_terms import TwoLevel, expand, group_sums
from fxquant.engine_readers.packed_layout import PackedLayout

_FLOAT64_STEP = 2.0**-53
NIBBLE_OFFSET = 8


@dataclass(frozen=True)
class PackedShard:
    """The output features `part` of a layout."""

    layout: PackedLayout
    part: slice

    def codes(self) -> Tensor:
        return expand(self._q, self._scales.steps())

    def exact(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """`(Σ_g s_g Σ_k (x - 8) q + scale_bias) * x_scale`, what the kernel computes without its roundings."""
        scale = self.layout.combined(self.part).double()
        sums = group_sums(x8.double() - NIBBLE_OFFSET, self._q, scale.shape[1])
        bias = self.layout.bias_columns[self.part].double().sum(1)
        return ((sums * scale).sum(-1) + bias) * x_scale.double()

    def kernel(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """`(16 Σ_g fp16(s_g Σ hi q) + Σ_g fp16(s_g Σ lo q) + scale_bias) * x_scale`, both sums over g in float16.

        The device reads 19 bits of the scales. The kernel has faster paths for some shapes, which round less.
        """
        scale = truncate_fp19(self.layout.combined(self.part))
        high, low = (_half_sum(group_sums(part, self._q, scale.shape[1]), scale) for part in nibbles(x8))
        return (16 * high + low + self.layout.scale_bias[self.part]) * x_scale

    def bound(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """How far `exact` may be from `Σ_g channel group_g Σ_k x q * x_scale`, where the 8 and scale_bias cancel:

        - each s_g is off by its rounding to float16, times |Σ_k (x - 8) q| of the group;
        - with two levels, scale_bias is made of the channel scale rounded to bfloat16;
        - each column of scale_bias is rounded to float32 once, its own scale being at most twice the stored one;
        - float64's steps on the magnitudes that cancel.
        """
        scales, steps = self._scales, self._scales.steps()
        channel = scales.channel.double()
        sums = group_sums(x8.double() - NIBBLE_OFFSET, self._q, steps.shape[1]).abs()
        columns = self.layout.bias_columns.shape[1]
        # scale_bias is stored per column, so its roundings follow these sums and not x
        codes = NIBBLE_OFFSET * expand(self._q, steps).unflatten(1, (columns, -1)).sum(-1).double()
        bias_parts = codes.abs().sum(1) * channel
        bound = (sums * scales.error()).sum(-1) + 2 * U * bias_parts
        if scales.group is not None:
            bound = bound + half_step(scales.channel, torch.bfloat16) * codes.sum(1).abs()
        magnitude = (sums * (channel.unsqueeze(1) * steps)).sum(-1) + bias_parts
        return (bound + (steps.shape[1] + 20) * _FLOAT64_STEP * magnitude) * x_scale.double()

    @cached_property
    def _q(self) -> Tensor:
        """int8 [n, k], unpacked once."""
        return self.layout.codes(self.part)

    @cached_property
    def _scales(self) -> TwoLevel:
        return self.layout.scales.rows(self.part)


def _half_sum(sums: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., n] of `Σ_g fp16(sums * scale)`, added in float16; sums float64 [..., n, G], scale [n, G]."""
    total = torch.zeros(sums.shape[:-1], dtype=torch.float16)
    for group in range(sums.shape[-1]):
        total = total + (sums[..., group].float() * scale[:, group]).to(torch.float16)
    return total.float()
