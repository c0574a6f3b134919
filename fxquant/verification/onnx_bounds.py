"""Bounds for the ONNX graph: how far an operator may be from the graph's float32 value, from the actual operands.

Linear, norm, rotation, attention and gate have the bounds of `fxquant.verification.bounds`: both sides do the same sums
in another order. Integer results are exact. Experts run as one unit, so a last bit of their swiglu may move an int8
code.
"""

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.ops.quantized import expand_int4
from fxquant.program.operands import item_of, operand, operand_node
from fxquant.verification.bounds import RULES, U, Value, blocks, rule_of, values_of

STEPS_TO_A_CODE = 64
"""Roundings between the routed rows and the int8 codes of their swiglu, each relative to the value."""


def error_bound(node: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Bound for the value of `node`, of the shape of `expected`."""
    if not expected.is_floating_point():
        return torch.zeros_like(expected, dtype=torch.float64)
    call, rule = rule_of(node, RULES)
    if call.target == ops.grouped_dequantize:
        return _experts(call, value, expected)
    return (_other if rule is None else rule)(call, value, expected).reshape(expected.shape)


def _experts(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Rounding of the last dequantize, plus one weight for every code that lies within its error of a tie."""
    product, int4 = operand_node(call, "acc"), operand_node(call, "acc").target == ops.grouped_int4_matmul
    x_scale, weight_scale, counts = values_of(call, value, "x_scale", "weight_scale", "counts")
    bound = 8 * U * expected.abs().double()
    x8, weight = values_of(product, value, "x", "weight")
    second = value(operand(product, "weight_scale_second")) if int4 else None
    may_move = _near_a_tie(operand_node(product, "x"), value).double()
    for expert, rows in blocks(counts):
        codes = weight[expert]
        if int4:
            codes = expand_int4(codes, None if second is None else second[expert])
        scale = weight_scale[expert].double().abs().squeeze(-1) * x_scale[rows].double()
        bound[rows] += (may_move[rows] @ codes.double().abs().T) * scale
        bound[rows] += STEPS_TO_A_CODE * U * (x8[rows].double().abs() @ codes.double().abs().T) * scale
    return bound


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
