"""Bounds for the ONNX graph: how far an operator may be from the graph's float32 value, from the actual operands.

Linear, norm, rotation, attention and gate have the bounds of `fxquant.verification.bounds`: both sides do the same sums
in another order. Integer results are exact. Experts run as one unit, so a last bit of their swiglu may move an int8
code.
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.ops.quantized import decode_deq_scale, expand_int4
from fxquant.program.operands import item_of, operand, operand_node
from fxquant.verification.block_bounds import block_experts_bound, block_linear_bound
from fxquant.verification.bounds import RULES, Rule, U, Value, blocks, magnitudes, rule_of, values_of

STEPS_TO_A_CODE = 64
"""Roundings between the routed rows and the int8 codes of their swiglu, each relative to the value."""


def error_bound(node: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Bound for the value of `node`, of the shape of `expected`."""
    if not expected.is_floating_point():
        return torch.zeros_like(expected, dtype=torch.float64)
    call, rule = rule_of(node, ONNX_RULES)
    return (_other if rule is None else rule)(call, value, expected).reshape(expected.shape)


def _experts(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Rounding of the last dequantize, plus one weight for every code that lies within its error of a tie."""
    joined = call.target != ops.grouped_dequantize
    product = call if joined else operand_node(call, "acc")
    int4 = product.target in (ops.grouped_int4_matmul, ops.grouped_int4_linear)
    x_scale, weight_scale, counts = values_of(call, value, "x_scale", "weight_scale", "counts")
    bound = 8 * U * expected.abs().double()
    x8, weight = values_of(product, value, "x", "weight")
    second = value(operand(product, "weight_scale_second")) if int4 else None
    may_move = _near_a_tie(operand_node(product, "x"), value).double()
    steps = STEPS_TO_A_CODE + (2 * x8.shape[-1] if joined else 0)  # a joined product may be a sum of floats
    for expert, rows in blocks(counts):
        codes = weight[expert]
        if int4:
            codes = expand_int4(codes, None if second is None else second[expert])
        scale = weight_scale[expert].double().abs().squeeze(-1) * x_scale[rows].double()
        bound[rows] += magnitudes(may_move[rows], codes) * scale
        bound[rows] += steps * U * magnitudes(x8[rows], codes) * scale
    return bound


def _per_token_linear(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Sums of k floats where nothing fuses them to integers, three roundings, and a bias that may cancel the value."""
    x8, x_scale, weight, weight_scale = values_of(call, value, "x", "x_scale", "weight", "weight_scale")
    if call.target == ops.per_token_int4_linear:
        second = operand(call, "weight_scale_second")
        weight = expand_int4(weight, None if second is None else value(second))
    magnitude = magnitudes(x8, weight) * weight_scale.double().abs().squeeze(-1) * x_scale
    bias = operand(call, "bias")
    added = 0 if bias is None else value(bias).double().abs()
    return 2 * (x8.shape[-1] + 8) * U * (magnitude + added)


def _static_linear(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """As per token; QuantizeLinear rounds before it adds the offset, so a code at a tie may be the next one."""
    x, weight, scale, offset = values_of(call, value, "x", "weight", "input_scale", "input_offset")
    deq_scale, quant_bias = values_of(call, value, "deq_scale", "quant_bias")
    real = x.double() / scale.double() + offset.double()
    near = ((real - real.floor()) - 0.5).abs() <= 4 * U * (real.abs() + 2 * offset.double().abs() + 1)
    codes = ops.quantize_static(x, scale, offset).double()
    sums = magnitudes(codes.abs() + offset.double().abs(), weight) + quant_bias.double().abs()
    moved = magnitudes(near, weight) + 2 * (weight.shape[1] + 8) * U * sums
    return moved * decode_deq_scale(deq_scale).double().abs()


def _near_a_tie(codes: fx.Node, value: Value) -> Tensor:
    """bool, of the shape of `codes`: whether the float behind a code is within its own error of the next one."""
    x = value(operand(item_of(codes)[0], "x")).double()
    real = x * (127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-30))
    distance = ((real - real.floor()) - 0.5).abs()
    return distance <= STEPS_TO_A_CODE * U * (real.abs() + 1)


def _other(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Any torch operator of a user's block: as many roundings as its longest row, relative to its largest operand."""
    tensors = [value(arg) for arg in call.all_input_nodes]
    floats = [
        operand
        for operand in tensors
        if isinstance(operand, Tensor) and operand.is_floating_point() and operand.numel()
    ]
    largest = max((float(operand.abs().max()) for operand in floats), default=0.0)
    length = max((operand.shape[-1] for operand in floats if operand.ndim), default=1)
    return (length + 16) * U * (expected.abs() + largest)


ONNX_RULES: dict[tuple[Any, int | None], Rule] = RULES | {
    (ops.grouped_dequantize, None): _experts,
    (ops.grouped_linear, None): _experts,
    (ops.grouped_int4_linear, None): _experts,
    (ops.per_token_linear, None): _per_token_linear,
    (ops.per_token_int4_linear, None): _per_token_linear,
    (ops.static_linear, None): _static_linear,
    (ops.block_linear, None): block_linear_bound,
    (ops.block_experts, None): block_experts_bound,
}
