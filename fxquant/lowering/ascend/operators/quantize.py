"""Quantize operators: float to int8, and the int64 form of a dequantization scale. rne = round half to even.

Formulas: op-plugin documentation; arithmetic and rounding: ops-nn kernels.
"""

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import dtype_of, require
from fxquant.ops import quantize_per_token

UNUSED_SCALE_BITS = 13
"""The device multiplies by the upper 19 bits of a float32: sign, exponent and 10 bits of the mantissa."""


def npu_dynamic_quant(
    x: Tensor, *, smooth_scales: Tensor | None = None, dst_type: int | None = None, quant_mode: str = "pertoken"
) -> tuple[Tensor, Tensor]:
    """x [..., k] → int8 `rne(y * (127 / m))`, float32 scale `m / 127` [...], with y = x * smooth_scales, m = max |y|.

    A row of zeros gives zeros and scale 0, for which the device divides by zero. smooth_scales [k].
    """
    if dst_type is not None:
        dtype_of(dst_type, "npu_dynamic_quant: dst_type", (torch.int8,))
    require(quant_mode == "pertoken", f"npu_dynamic_quant: quant_mode {quant_mode!r} is not supported, only 'pertoken'")
    wide = x.float()
    if smooth_scales is not None:
        shape = tuple(smooth_scales.shape)
        require(shape == x.shape[-1:], f"npu_dynamic_quant: smooth_scales {shape} is not one scale per feature")
        wide = wide * smooth_scales.float()
    quantized, scale = quantize_per_token(wide)
    return quantized, scale.squeeze(-1)


def npu_quantize(
    x: Tensor, scales: Tensor, zero_points: Tensor | None, *, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """int8 `clamp(rne(x / scales + zero_points), -128, 127)`, or `x * scales` without div_mode; in float32.

    scales and zero_points hold one value, or one per index of `axis`. Without div_mode every `axis` but -2 means the
    last one.
    """
    dtype_of(dtype, "npu_quantize: dtype", (torch.qint8,))
    if not div_mode:
        require(axis >= -2, f"npu_quantize: axis {axis} is below -2, which needs div_mode")
        axis = -2 if axis == -2 else -1
    scale = _along(x, scales, axis, "scales")
    scaled = x.float() / scale if div_mode else x.float() * scale
    if zero_points is not None:
        scaled = scaled + _along(x, zero_points, axis, "zero_points")
    return torch.round(scaled).clamp(-128, 127).to(torch.int8)


def _along(x: Tensor, values: Tensor, axis: int, name: str) -> Tensor:
    """float32 `values`, shaped to broadcast over all dimensions of x but `axis`."""
    require(-x.dim() <= axis < x.dim(), f"npu_quantize: axis {axis} is outside the {x.dim()} dimensions of the input")
    fits = values.numel() == 1 or (values.dim() == 1 and len(values) == x.shape[axis])
    require(fits, f"npu_quantize: {name} {tuple(values.shape)} does not fit axis {axis} of {tuple(x.shape)}")
    shape = [1] * x.dim()
    shape[axis] = values.numel()
    return values.float().reshape(shape)


def npu_trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """float32 scale → int64: upper 19 bits of the float, bit 46 set, and in bits 37 to 45 the offset.

    round_mode 0 truncates the other 13 bits, 1 rounds them (half to even). offset: float32 of one value or of scale's
    shape, `clamp(rne(offset), -256, 255)` as 9 bits of two's complement.
    """
    require(scale.dtype == torch.float32, f"npu_trans_quant_param: scale is {scale.dtype}, not torch.float32")
    require(round_mode in {0, 1}, f"npu_trans_quant_param: round_mode is {round_mode}, not 0 or 1")
    rounded = round_to_19_bits(scale) if round_mode else truncate_to_19_bits(scale)
    encoded = rounded.view(torch.int32).long() & 0xFFFFFFFF | 1 << 46
    if offset is None:
        return encoded
    fits = offset.numel() == 1 or offset.shape == scale.shape
    require(fits, f"npu_trans_quant_param: offset {tuple(offset.shape)} does not fit scale {tuple(scale.shape)}")
    return encoded | (torch.round(offset.float()).clamp(-256, 255).long() & 0x1FF) << 37


def truncate_to_19_bits(scale: Tensor) -> Tensor:
    """The factor that the device uses if an int64 carries the float32 `scale`; the kernels here use all 32 bits.

    To follow the device, pass them truncated scales.
    """
    return (scale.view(torch.int32) & -(1 << UNUSED_SCALE_BITS)).view(torch.float32)


def round_to_19_bits(scale: Tensor) -> Tensor:
    """Nearest float32 with 10 bits of mantissa, ties to even; for normal numbers."""
    bits = scale.view(torch.int32)
    half = (1 << UNUSED_SCALE_BITS - 1) - 1 + (bits >> UNUSED_SCALE_BITS & 1)
    return truncate_to_19_bits((bits + half).view(torch.float32))
