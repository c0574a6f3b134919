"""Quantized matmul with the dequantization that devices fuse into it: the operator, and the statements that call it.

Formula: op-plugin documentation.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.lowering.ascend.calls import NPU, Call, Fused
from fxquant.lowering.ascend.operators.arguments import OUTPUT_DTYPES, Kernel, dtype_of, require
from fxquant.lowering.ascend.operators.shapes import output_dtype_of, rows
from fxquant.ops import int_matmul
from fxquant.ops.quantized import decode_deq_scale

if TYPE_CHECKING:
    from fxquant.lowering.ascend.emitter.segment_text import Writer


def npu_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    scale: Tensor,
    *,
    pertoken_scale: Tensor | None = None,
    bias: Tensor | None = None,
    output_dtype: int | None = None,
) -> Tensor:
    """int8 x1 [..., m, k] @ int8 x2 [k, n] → [..., m, n], summed in int32, scaled in float32, rounded once.

    int32 bias [n]: `(x1 @ x2 + bias) * scale * pertoken_scale`; float bias: `x1 @ x2 * scale * pertoken_scale + bias`.
    scale, one value or [n]: float32 or bfloat16; or int64 with float32 bits in the low word and no per-token scale,
    for float16 results. Here all 32 bits are used, on a device the upper 19: `quantize.truncate_to_19_bits`.
    pertoken_scale float32 [m].
    """
    name = "npu_quant_matmul"
    dtype = dtype_of(output_dtype, f"{name}: output_dtype", OUTPUT_DTYPES)
    require(x1.dtype == torch.int8 and x1.dim() >= 2, f"{name}: x1 is {x1.dtype} {tuple(x1.shape)}, not int8 matrices")
    fits = x2.dtype == torch.int8 and x2.dim() == 2 and len(x2) == x1.shape[-1]
    require(fits, f"{name}: x2 is {x2.dtype} {tuple(x2.shape)}, not int8 [{x1.shape[-1]}, n]")
    acc = int_matmul(x1, x2.T)
    if bias is not None:
        require(bias.shape == acc.shape[-1:], f"{name}: bias {tuple(bias.shape)} is not [{acc.shape[-1]}]")
        acc = acc + bias if bias.dtype == torch.int32 else acc
    y = acc.float() * _channel_scale(scale, acc.shape[-1], dtype, pertoken_scale is not None)
    if pertoken_scale is not None:
        shape, kind = tuple(pertoken_scale.shape), pertoken_scale.dtype
        fits = kind == torch.float32 and shape == x1.shape[-2:-1]
        require(fits, f"{name}: pertoken_scale {kind} {shape} is not float32 [{x1.shape[-2]}]")
        y = y * pertoken_scale[:, None]
    if bias is not None and bias.dtype != torch.int32:
        require(bias.is_floating_point(), f"{name}: bias is {bias.dtype}, neither int32 nor float")
        y = y + bias.float()
    return y.to(dtype)


def _channel_scale(scale: Tensor, out_features: int, dtype: torch.dtype, per_token: bool) -> Tensor:
    """float32 [1 or n]."""
    argument = "npu_quant_matmul: scale"
    fits = scale.dim() == 1 and len(scale) in {1, out_features}
    require(fits, f"{argument} {tuple(scale.shape)} is neither [1] nor [{out_features}]")
    if scale.dtype != torch.int64:
        require(scale.dtype in {torch.float32, torch.bfloat16}, f"{argument} is {scale.dtype}")
        return scale.float()
    require(not per_token, f"{argument} is int64, which does not go with pertoken_scale")
    require(dtype != torch.bfloat16, f"{argument} is int64, which goes with float16, not with output_dtype bfloat16")
    # A checkpoint's int64 is the sign-extended float32, so only a nonnegative one can carry an offset in these bits.
    offset = (scale >> 37 & 0x1FF) * (scale >= 0)
    require(not offset.any(), f"{argument} carries an offset, which only int8 results take")
    return decode_deq_scale(scale)


def npu_quant_matmul_shape(x1: Tensor, x2: Tensor, output_dtype: int | None = None) -> Tensor:
    return rows(x1, x2.shape[1], dtype=output_dtype_of(output_dtype, torch.int8))


def _static_linear(writer: "Writer", node: fx.Node, acc: fx.Node, deq_scale: fx.Node, quant_bias: fx.Node) -> Call:
    x8, weight = writer.operand(acc, "x"), writer.operand(acc, "weight")
    operand_texts = writer.value(x8), writer.value(weight, "int8_transposed"), writer.value(deq_scale, "as_stored")
    bias = f"bias={writer.value(quant_bias, 'as_stored')}"
    return Call(f"{NPU}npu_quant_matmul", (*operand_texts, bias, "output_dtype=dtype"))


def _per_token_linear(
    writer: "Writer", node: fx.Node, acc: fx.Node, x_scale: fx.Node, weight_scale: fx.Node, bias: fx.Node | None
) -> Call:
    """The per-token scale is one number per row, so leading dimensions are flattened around the operator."""
    x8, weight = writer.value(writer.operand(acc, "x")), writer.value(writer.operand(acc, "weight"), "int8_transposed")
    scale = writer.value(weight_scale, "channel_scale")
    operand_texts = [f"{x8}.flatten(0, -2)", weight, scale, f"pertoken_scale={writer.value(x_scale)}.flatten()"]
    if bias is not None:
        operand_texts.append(f"bias={writer.value(bias)}")
    operand_texts.append("output_dtype=dtype")
    return Call(f"{NPU}npu_quant_matmul", tuple(operand_texts), f".unflatten(0, {x8}.shape[:-1])")


KERNELS: dict[str, Kernel] = {"npu_quant_matmul": npu_quant_matmul}
SHAPES: dict[str, Kernel] = {"npu_quant_matmul": npu_quant_matmul_shape}
LINEARS: dict[tuple[Any, Any], Fused] = {
    (ops.dequantize_static, ops.int_matmul): Fused("acc", _static_linear),
    (ops.dequantize_per_token, ops.int_matmul): Fused("acc", _per_token_linear),
}
"""(call, call that makes one of its operands) → the statement for both."""
