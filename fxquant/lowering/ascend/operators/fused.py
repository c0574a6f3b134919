"""Fused operators: norm of a sum, and quantization of a norm or swiglu. n features.

Formulas and dtypes: op-plugin documentation, ops-nn kernels. A device does not round inside a fused operator: here
everything is float32 from the sum, or from the halves, to the integers.
"""

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require
from fxquant.lowering.ascend.operators.dense import npu_rms_norm
from fxquant.ops import quantize_per_token, rms_norm, swiglu

QUANTIZER_DTYPES = {
    torch.float16: (torch.float32, torch.int32),
    torch.bfloat16: (torch.bfloat16, torch.bfloat16),
    torch.float32: (torch.float32, torch.float32),
}
"""Dtype of x → the dtypes of scales1 and zero_points1 that A2 and A3 require with it; float32 is ours."""


def npu_add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """x1, x2 [..., n], gamma [n] → `npu_rms_norm(x)`, its float32 rstd [..., 1], and x = x1 + x2 in their dtype."""
    total = _sum("npu_add_rms_norm", x1, x2, gamma, None)
    return *npu_rms_norm(total, gamma, epsilon), total


def npu_add_rms_norm_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    beta: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-6,
    div_mode: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """With y = norm(x1 + x2) * gamma + beta: int8 `clamp(rne(y / scales1 + zero_points1), -128, 127)`, an empty tensor,
    and x1 + x2. gamma, beta, scales1 and zero_points1 [n]."""
    name = "npu_add_rms_norm_quant"
    require(axis == -1 and div_mode, f"{name}: axis {axis}, div_mode {div_mode}: devices take -1 and True only")
    total = _sum(name, x1, x2, gamma, beta)
    scale_dtype, zero_dtype = QUANTIZER_DTYPES[x1.dtype]
    for argument, value, dtype in (("scales1", scales1, scale_dtype), ("zero_points1", zero_points1, zero_dtype)):
        if value is not None:
            given = f"{value.dtype} {tuple(value.shape)}"
            fits = value.dtype == dtype and value.shape == gamma.shape
            require(fits, f"{name}: {argument} is {given}; with x {x1.dtype} it is {dtype} {tuple(gamma.shape)}")
    scaled = _norm(total, gamma, epsilon, beta) / scales1.float()
    if zero_points1 is not None:
        scaled = scaled + zero_points1.float()
    return torch.round(scaled).clamp(-128, 127).to(torch.int8), x1.new_empty(0, dtype=torch.int8), total


def npu_add_rms_norm_dynamic_quant(
    x1: Tensor,
    x2: Tensor,
    gamma: Tensor,
    *,
    beta: Tensor | None = None,
    epsilon: float = 1e-6,
    output_mask: list[bool] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """With y = norm(x1 + x2) * gamma + beta: y as `npu_dynamic_quant` quantizes it, int8 [..., n], an empty tensor,
    x1 + x2, float32 scale [...], an empty tensor. output_mask selects among two quantizations: here only the first."""
    name = "npu_add_rms_norm_dynamic_quant"
    mask = None if output_mask is None else list(output_mask)
    require(mask in (None, [True, False]), f"{name}: output_mask {mask} is not supported, only [True, False]")
    total = _sum(name, x1, x2, gamma, beta)
    quantized, scale = quantize_per_token(_norm(total, gamma, epsilon, beta))
    return quantized, quantized.new_empty(0), total, scale.squeeze(-1), scale.new_empty(0)


def npu_dequant_swiglu_quant(x: Tensor, *, activate_left: bool = False, quant_mode: int = 0) -> tuple[Tensor, Tensor]:
    """Float x [..., 2n], at least two dimensions → swiglu as `npu_dynamic_quant` quantizes it: int8 [..., n], float32
    scale [...]. silu of the left half with activate_left, else of the right one. Only quant_mode 1 (per token).

    A device limits n: see `deployment.WIDEST_SWIGLU`.
    """
    name = "npu_dequant_swiglu_quant"
    require(quant_mode == 1, f"{name}: quant_mode {quant_mode} is not supported, only 1 (per token)")
    require(x.is_floating_point(), f"{name}: x is {x.dtype}; integers, which need weight_scale, are not supported")
    require(x.dim() > 1 and x.shape[-1] % 2 == 0, f"{name}: x {tuple(x.shape)} is not [..., tokens, 2n]")
    # Contiguous, like the operands of fxq::swiglu: see npu_swiglu.
    left, right = (half.float().contiguous() for half in x.chunk(2, -1))
    quantized, scale = quantize_per_token(swiglu(left, right) if activate_left else swiglu(right, left))
    return quantized, scale.squeeze(-1)


def _sum(name: str, x1: Tensor, x2: Tensor, gamma: Tensor, beta: Tensor | None) -> Tensor:
    """x1 + x2, after the checks that all these operators share."""
    require(x1.shape == x2.shape and x1.dtype == x2.dtype, f"{name}: x1 and x2 differ in shape or dtype")
    for argument, value in (("gamma", gamma), ("beta", beta)):
        if value is not None:
            fits = value.dtype == x1.dtype and value.shape == x1.shape[-1:]
            given = f"{value.dtype} {tuple(value.shape)}"
            require(fits, f"{name}: {argument} is {given}, not {x1.dtype} [{x1.shape[-1]}]")
    return x1 + x2


def _norm(total: Tensor, gamma: Tensor, epsilon: float, beta: Tensor | None) -> Tensor:
    """float32 `norm(total) * gamma + beta`."""
    return rms_norm(total.float(), gamma.float(), epsilon, None if beta is None else beta.float())
