"""Unpacked int4 shard: one projection on one rank, int8 activations times integers, no scale_bias."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.engine_readers.int4_terms import TwoLevel, expand, group_sums

_FLOAT64_STEP = 2.0**-53


@dataclass(frozen=True)
class UnpackedShard:
    """`Σ_g s_g Σ_k x q * x_scale`: weight int8 [n, k] in [-8, 7], s_g the scales rounded to float16."""

    weight: Tensor
    scales: TwoLevel

    def codes(self) -> Tensor:
        return expand(self.weight, self.scales.steps())

    def exact(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        scale = self.scales.combined()
        sums = group_sums(x8, self.weight, scale.shape[1])
        return (sums * scale.double()).sum(-1) * x_scale.double()

    def kernel(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """Groups are added in float32."""
        scale = self.scales.combined()
        sums = group_sums(x8, self.weight, scale.shape[1]).float()
        total = torch.zeros(sums.shape[:-1])
        for group in range(scale.shape[1]):
            total = total + sums[..., group] * scale[:, group]
        return total * x_scale

    def bound(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """Each group's sum times the error of its scale, and float64's steps."""
        steps = self.scales.steps()
        sums = group_sums(x8, self.weight, steps.shape[1]).abs()
        magnitude = sums * self.scales.channel.double().unsqueeze(1) * steps
        off = sums * self.scales.error() + (steps.shape[1] + 8) * _FLOAT64_STEP * magnitude
        return off.sum(-1) * x_scale.double()
