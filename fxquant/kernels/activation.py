"""Static activation parameters: scale and offset per tensor, asymmetric int8."""

import torch
from torch import Tensor

from fxquant.schemes.schemes import ActivationRange

SMALLEST_SCALE = torch.finfo(torch.float32).eps


def static_parameters(observed: ActivationRange) -> tuple[Tensor, Tensor]:
    """input_scale and input_offset, 0-d, computed in `observed.arithmetic`.

    lo = min(low, 0), hi = max(high, 0); scale = (hi - lo) / 255, at least float32's eps;
    offset = rne(-lo / scale) - 128. The offset is an integer in [-128, 127], kept as a float.
    """
    low = torch.tensor(min(observed.low, 0.0), dtype=observed.arithmetic)
    high = torch.tensor(max(observed.high, 0.0), dtype=observed.arithmetic)
    scale = ((high - low) / 255).clamp(min=SMALLEST_SCALE)
    return scale, (torch.round(-low / scale) - 128).clamp(-128, 127)


def fused_parameters(
    sums: Tensor, weight_scale: Tensor, input_scale: Tensor, input_offset: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """deq_scale float32 [n] and quant_bias [n] (integers in float64) of a static linear, from parameters as stored.

    sums int64 [n] are the sums of q over k. deq_scale = input_scale * weight_scale; quant_bias = rne(bias / deq_scale -
    input_offset * sums).
    """
    deq_scale = input_scale.float() * weight_scale.flatten()
    shift = input_offset.double() * sums.double()
    folded = torch.zeros_like(shift)
    if bias is not None:
        folded = (bias.float() / torch.where(deq_scale > 0, deq_scale, 1)).double()
    return deq_scale, torch.round(folded - shift)


def encode_deq_scale(deq_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """float16 models store the float32 bits, sign-extended to int64; others store float32."""
    return deq_scale.view(torch.int32).to(torch.int64) if dtype is torch.float16 else deq_scale
