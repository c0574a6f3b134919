"""Grouped matmul, one per expert, on rows sorted by expert. M rows, E experts, k in_features, n out_features, G groups
of k.

The A8W4 formula is that of the ops-transformer kernels (grouped_matmul, antiquant A8W4 MSD).
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.calls import NPU, Call, Fused
from fxquant.lowering.ascend.operators.arguments import OUTPUT_DTYPES, Kernel, dtype_of, require
from fxquant.lowering.ascend.operators.shapes import output_dtype_of
from fxquant.lowering.ascend.operators.shapes import rows as rows_of
from fxquant.ops import int_matmul
from fxquant.ops.quantized import decode_deq_scale

if TYPE_CHECKING:
    from fxquant.lowering.ascend.emitter.segment_text import Writer
    from fxquant.schemes.schemes import Recipe

Multiply = Callable[[int, slice], Tensor]
"""(expert, its rows) → product [rows, n] before it is rounded."""

NAME = "npu_grouped_matmul"
WORD = 8
"""Int4 output channels in one int32 of a weight."""


def npu_grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    scale: Sequence[Tensor] | None = None,
    per_token_scale: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    output_dtype: int | None = None,
) -> list[Tensor]:
    """Lists of one: x [M, k], weight [E, k, n], rows per expert int64 [E] → [M, n]. The dtype of weight decides:

    float  `x @ weight`, in their dtype.
    int8   int8 x: `x @ weight * scale * per_token_scale`; scale float32 or bfloat16 [E, n].
    int32  [E, k, n / 8], int4 with the lowest n in the lowest bits; int8 x: see `_a8w4`.
    Only split_item 2 or 3, group_type 0, group_list_type 1.
    """
    require(split_item in {2, 3}, f"{NAME}: split_item {split_item} is not supported, only 2 and 3 (one output)")
    require(group_type == 0, f"{NAME}: group_type {group_type} is not supported, only 0 (groups of rows)")
    require(group_list_type == 1, f"{NAME}: group_list_type {group_list_type} is not supported, only 1 (counts)")
    rows, weights = _only("x", x), _only("weight", weight)
    require(rows.dim() == 2 and weights.dim() == 3, f"{NAME}: x is not [M, k] or weight not [E, k, n]")
    require(rows.shape[1] == weights.shape[1], f"{NAME}: x has {rows.shape[1]} features, weight {weights.shape[1]}")
    if weights.is_floating_point():
        for argument, value in (("bias", bias), ("scale", scale), ("per_token_scale", per_token_scale)):
            require(value is None, f"{NAME}: {argument} is not supported with a float weight")
        multiply, out_features, dtype = _float(rows, weights), weights.shape[2], rows.dtype
        if output_dtype is not None:
            dtype_of(output_dtype, f"{NAME}: output_dtype", (dtype,))
    else:
        dtype = dtype_of(output_dtype, f"{NAME}: output_dtype", OUTPUT_DTYPES)
        multiply, out_features = _quantized(rows, weights, bias, scale, per_token_scale)
    out = rows.new_empty(len(rows), out_features, dtype=dtype)
    for expert, block in enumerate(_blocks(group_list, len(rows), len(weights))):
        if block.start < block.stop:
            out[block] = multiply(expert, block)
    return [out]


def _float(x: Tensor, weight: Tensor) -> Multiply:
    require(x.dtype == weight.dtype, f"{NAME}: x is {x.dtype}, weight is {weight.dtype}")
    return lambda expert, rows: x[rows] @ weight[expert]


def _quantized(
    x: Tensor,
    weight: Tensor,
    bias: Sequence[Tensor] | None,
    scale: Sequence[Tensor] | None,
    per_token_scale: Sequence[Tensor] | None,
) -> tuple[Multiply, int]:
    """The product for integer weights, and n."""
    require(x.dtype == torch.int8, f"{NAME}: x is {x.dtype}, weight is {weight.dtype}")
    x_scale = _only("per_token_scale", per_token_scale)
    fits = x_scale.dtype == torch.float32 and x_scale.shape == x.shape[:1]
    require(fits, f"{NAME}: per_token_scale {x_scale.dtype} {tuple(x_scale.shape)} is not float32 [{len(x)}]")
    if weight.dtype == torch.int32:
        out_features = weight.shape[2] * 8
        return _a8w4(x, weight, _only("scale", scale), _only("bias", bias), x_scale), out_features
    require(weight.dtype == torch.int8, f"{NAME}: weight is {weight.dtype}, not float, int8 or int32 (packed int4)")
    require(bias is None, f"{NAME}: bias is not supported with an int8 weight")
    return _a8w8(x, weight, _only("scale", scale), x_scale), weight.shape[2]


def _a8w8(x: Tensor, weight: Tensor, scale: Tensor, x_scale: Tensor) -> Multiply:
    fits = scale.shape == (len(weight), weight.shape[2]) and scale.dtype in {torch.float32, torch.bfloat16}
    require(fits, f"{NAME}: scale {scale.dtype} {tuple(scale.shape)} is not float [{len(weight)}, {weight.shape[2]}]")
    return lambda expert, rows: (
        int_matmul(x[rows], weight[expert].T).float() * scale[expert].float() * x_scale[rows, None]
    )


def _a8w4(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor, x_scale: Tensor) -> Multiply:
    """`(16 * Σ_g scale_g (hi @ w_g) + Σ_g scale_g (lo @ w_g) + bias) * x_scale`, where x = 16 hi + lo + 8.

    hi, lo and the weights are signed int4; inner sums are int32, the rest is float32. The 8 of every x is in bias:
    float32 [E, n], `8 * Σ_k weight * scale`. A device adds groups in float16, which we do not imitate: it loses up to
    2^-10 of the largest partial sum, and partial sums above 65504.
    scale int64 [E, G, n] with float32 bits in the low word. Devices require k % 64 == 0 and groups of 256 or one group.
    """
    experts, in_features, words = weight.shape
    fits = scale.dtype == torch.int64 and scale.dim() == 3 and scale.shape[::2] == (experts, words * 8)
    require(fits, f"{NAME}: scale {scale.dtype} {tuple(scale.shape)} is not int64 [{experts}, G, {words * 8}]")
    require(in_features % scale.shape[1] == 0, f"{NAME}: scale has {scale.shape[1]} groups for {in_features} features")
    fits = bias.dtype == torch.float32 and bias.shape == (experts, words * 8)
    require(fits, f"{NAME}: bias {bias.dtype} {tuple(bias.shape)} is not float32 [{experts}, {words * 8}]")
    high, low = split_nibbles(x)

    def multiply(expert: int, rows: slice) -> Tensor:
        expert_scale = decode_deq_scale(scale[expert])
        group_size = in_features // len(expert_scale)
        total_high = total_low = bias.new_zeros(rows.stop - rows.start, words * 8)
        for group, group_scale in enumerate(expert_scale):
            features = slice(group * group_size, (group + 1) * group_size)
            codes = unpack_int4(weight[expert, features])
            total_high = total_high + int_matmul(high[rows, features], codes.T).float() * group_scale
            total_low = total_low + int_matmul(low[rows, features], codes.T).float() * group_scale
        return (total_high * 16 + total_low + bias[expert]) * x_scale[rows, None]

    return multiply


def split_nibbles(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 x → int8 hi, lo in [-8, 7] with x = 16 hi + lo + 8."""
    return x >> 4, (x & 15) - 8


def unpack_int4(words: Tensor) -> Tensor:
    """int32 [..., n / 8] → int8 [..., n], the lowest n from the lowest four bits, two's complement."""
    shifts = torch.arange(28, -1, -4, dtype=torch.int32, device=words.device)
    # left, then right: the arithmetic shift of int32 extends the sign
    return (words.unsqueeze(-1) << shifts >> 28).to(torch.int8).flatten(-2)


def _only(argument: str, tensors: Sequence[Tensor] | None) -> Tensor:
    if tensors is None or len(tensors) != 1:
        raise ValueError(f"{NAME}: {argument} must be a list of one tensor here")
    return tensors[0]


def _blocks(group_list: Tensor | None, rows: int, experts: int) -> list[slice]:
    """The rows of each expert."""
    if group_list is None or group_list.dtype != torch.int64 or group_list.shape != (experts,):
        raise ValueError(f"{NAME}: group_list must be int64 [{experts}]")
    stops = group_list.cumsum(0).tolist()
    require((group_list >= 0).all() and stops[-1] == rows, f"{NAME}: group_list counts do not add up to {rows} rows")
    return [slice(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]


def npu_grouped_matmul_shape(
    x: Sequence[Tensor], weight: Sequence[Tensor], output_dtype: int | None = None
) -> list[Tensor]:
    words = WORD if weight[0].dtype == torch.int32 else 1
    return [rows_of(x[0], weight[0].shape[2] * words, dtype=output_dtype_of(output_dtype, x[0].dtype))]


def grouped_matmul(x: str, operand_texts: list[str], counts: str, rest: tuple[str, ...] = ()) -> Call:
    """Source of a call on rows `x`, sorted by expert, `counts` of them per expert."""
    groups = (f"group_list={counts}", "split_item=2", "group_type=0", "group_list_type=1")
    return Call(f"{NPU}{NAME}", (f"[{x}]", *operand_texts, *groups, *rest), "[0]")


def _int4_linear(
    writer: "Writer", node: fx.Node, acc: fx.Node, x_scale: fx.Node, weight_scale: fx.Node, bias: fx.Node | None
) -> Call:
    recipe = writer.recipe(writer.operand(acc, "weight"))
    operand_texts = writer.value(writer.operand(acc, "x")), writer.value(x_scale), *_int4_operands(writer, recipe)
    call = writer.call("int4_linear", *operand_texts, "dtype")
    return call if bias is None else Call(call.head, call.arguments, f" + {writer.value(bias)}")


def _int4_operands(writer: "Writer", recipe: "Recipe") -> tuple[str, str, str]:
    """Weight, combined scale and scale_bias."""
    weight, packed = int4_weight(writer, recipe, NAME), recipe.weight_format.packed
    scales = ("weight_scale", "weight_scale_second") if recipe.group_size else ("weight_scale",)
    scale = writer.computed(recipe, "scale", "group_scale" if recipe.group_size else "channel_scale_word", scales)
    if packed:
        return weight, scale, writer.computed(recipe, "scale_bias", "summed", ("scale_bias",))
    layout = "group_scale_bias" if recipe.group_size else "channel_scale_bias"
    return weight, scale, writer.computed(recipe, "scale_bias", layout, ("weight", *scales))


def int4_weight(writer: "Writer", recipe: "Recipe", operator: str) -> str:
    """Source of int32 [experts, k, n / 8] for an operator. Raises FxquantError if n is not a whole number of words."""
    n = recipe.out_features
    if n % WORD:
        fact = f"out_features {n} is not a multiple of {WORD}: {operator} reads {WORD} int4 channels per word."
        raise FxquantError(f"layer {recipe.module}", fact, "Use W8A8_DYNAMIC for it, or another target.")
    layout = "int4_words" if recipe.weight_format.packed else "int4_words_unpacked"
    return writer.computed(recipe, "weight", layout, ("weight",))


def _int8_experts(
    writer: "Writer", node: fx.Node, acc: fx.Node, x_scale: fx.Node, weight_scale: fx.Node, counts: fx.Node
) -> Call:
    weight, scale = (
        writer.value(writer.operand(acc, "weight"), "int8_transposed"),
        writer.value(weight_scale, "expert_scale"),
    )
    return _experts(writer, acc, [f"[{weight}]", f"scale=[{scale}]"], x_scale, counts)


def _int4_experts(
    writer: "Writer", node: fx.Node, acc: fx.Node, x_scale: fx.Node, weight_scale: fx.Node, counts: fx.Node
) -> Call:
    weight, scale, bias = _int4_operands(writer, writer.recipe(writer.operand(acc, "weight")))
    return _experts(writer, acc, [f"[{weight}]", f"bias=[{bias}]", f"scale=[{scale}]"], x_scale, counts)


def _experts(writer: "Writer", acc: fx.Node, operand_texts: list[str], x_scale: fx.Node, counts: fx.Node) -> Call:
    scaled = [*operand_texts, f"per_token_scale=[{writer.value(x_scale)}]"]
    return grouped_matmul(writer.value(writer.operand(acc, "x")), scaled, writer.value(counts), ("output_dtype=dtype",))


KERNELS: dict[str, Kernel] = {NAME: npu_grouped_matmul}
SHAPES: dict[str, Kernel] = {NAME: npu_grouped_matmul_shape}
LINEARS: dict[tuple[Any, Any], Fused] = {
    (ops.dequantize_per_token, ops.int4_matmul): Fused("acc", _int4_linear),
    (ops.grouped_dequantize, ops.grouped_int_matmul): Fused("acc", _int8_experts),
    (ops.grouped_dequantize, ops.grouped_int4_matmul): Fused("acc", _int4_experts),
}
"""(call, call that makes one of its operands) → the statement for both."""
