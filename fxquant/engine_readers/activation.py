"""Activation quantization: how an engine turns a linear's float input into int8."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import Arithmetic, quantize_per_token, round_to_int8


class Activation(Protocol):
    """Quantization of x float32 [..., k]."""

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """int8 [..., k] and its float32 scale, one per row [..., 1] or one for all [1]."""


@dataclass(frozen=True)
class PerToken:
    """npu_dynamic_quant. On the device, x has the model's dtype."""

    dtype: torch.dtype

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        return quantize_per_token(_arrived(x, self.dtype, arithmetic))


@dataclass(frozen=True)
class PerTensor:
    """npu_quantize with one scale and offset [1], both held in the model's dtype: `clamp(rne(x / scale + offset))`.

    With `reciprocal` (vllm-ascend: div_mode False) the device multiplies by `1 / scale` rounded to that dtype, off by
    up to one part in 2**8 (bfloat16) from the scale by which the product is dequantized.
    """

    scale: Tensor
    offset: Tensor
    reciprocal: bool

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        scale, offset = self.scale.float(), self.offset.float()
        arrived = _arrived(x, self.scale.dtype, arithmetic)
        if arithmetic is Arithmetic.KERNEL and self.reciprocal:
            return round_to_int8(arrived * (1 / self.scale).float() + offset), scale
        return round_to_int8(arrived / scale + offset), scale


def _arrived(x: Tensor, dtype: torch.dtype, arithmetic: Arithmetic) -> Tensor:
    return x.to(dtype).float() if arithmetic is Arithmetic.KERNEL else x.float()
