"""Int8 shards: linears of int8 weights on one rank, static and per token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import float32_bits, truncate_fp19, wide_product

_FLOAT64_STEPS = 8 * 2.0**-53


@dataclass(frozen=True)
class StaticShard:
    """`(Σ x8 * weight + quant_bias) * deq_scale`, npu_quant_matmul.

    weight int8 [k, n], transposed on load; deq_scale float32 [n], or int64 whose low words are float32 bits (float16
    models), of which the device reads 19; quant_bias int32 [n], None on all but the first rank of a row-parallel one.
    """

    weight: Tensor
    deq_scale: Tensor
    quant_bias: Tensor | None

    def codes(self) -> Tensor:
        return self.weight.T

    def exact(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        return self._sums(x8) * self._scale().double()

    def kernel(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        scale = self._scale()
        return self._sums(x8).float() * (truncate_fp19(scale) if self.deq_scale.dtype is torch.int64 else scale)

    def bound(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """Nothing is rounded on load; one product in float64."""
        return _FLOAT64_STEPS * self.exact(x8, x_scale).abs()

    def _scale(self) -> Tensor:
        return float32_bits(self.deq_scale) if self.deq_scale.dtype is torch.int64 else self.deq_scale

    def _sums(self, x8: Tensor) -> Tensor:
        """float64 holds these integers exactly."""
        sums = wide_product(x8, self.weight.T)
        return sums if self.quant_bias is None else sums + self.quant_bias.double()


@dataclass(frozen=True)
class PerTokenShard:
    """`Σ x8 * weight * weight_scale * x_scale + bias`, npu_quant_matmul with per-token scales.

    weight int8 [k, n]; weight_scale [n] as the engine holds it, `scale_error` float64 [n] how far that may be from the
    stored one; bias float [n], None where there is none or another rank adds it.
    """

    weight: Tensor
    weight_scale: Tensor
    scale_error: Tensor
    bias: Tensor | None

    def codes(self) -> Tensor:
        return self.weight.T

    def exact(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        y = self._sums(x8) * self.weight_scale.double() * x_scale.double()
        return y if self.bias is None else y + self.bias.double()

    def kernel(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        y = self._sums(x8).float() * self.weight_scale.float() * x_scale
        return y if self.bias is None else y + self.bias.float()

    def bound(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """The sum times the error of its scale, and float64's own steps; a bias may cancel values, not their errors."""
        sums = self._sums(x8).abs() * x_scale.double()
        added = 0.0 if self.bias is None else self.bias.double().abs()
        return sums * self.scale_error + _FLOAT64_STEPS * (sums * self.weight_scale.double() + added)

    def _sums(self, x8: Tensor) -> Tensor:
        return wide_product(x8, self.weight.T)
