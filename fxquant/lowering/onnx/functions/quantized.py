"""Function bodies of the operators in `fxquant.ops.quantized`; int8 activations are uint8 with zero point 128.

Every rounding of the references happens here in the same order, so integers and scales agree bit for bit.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import FLOAT, ZERO_POINT, Body, Builder
from fxquant.lowering.onnx.functions.attention import last
from fxquant.lowering.onnx.initializers import View
from fxquant.ops.quantized import SMALLEST_ROW_MAXIMUM


def quantize_static(b: Builder, x: ir.Value, input_scale: ir.Value, input_offset: ir.Value) -> ir.Value:
    """The sum is rounded to float32 before it is rounded to an integer, hence no QuantizeLinear by `input_scale`."""
    return _to_uint8(b, b.op("Add", b.op("Div", x, b.float(input_scale)), b.float(input_offset)))


def quantize_per_token(b: Builder, x: ir.Value) -> tuple[ir.Value, ...]:
    maximum = b.op("ReduceMax", b.op("Abs", x), b.ints(-1), keepdims=1)
    tiny = b.op("Less", maximum, b.number(SMALLEST_ROW_MAXIMUM))
    step = b.op("Where", tiny, b.number(0), b.op("Div", b.number(127), maximum))
    return _to_uint8(b, b.op("Mul", x, step)), b.op("Div", maximum, b.number(127))


def _to_uint8(b: Builder, x: ir.Value) -> ir.Value:
    """`clamp(rne(x), -128, 127) + 128`: QuantizeLinear with scale 1 rounds half to even and saturates."""
    return b.op("QuantizeLinear", x, b.number(1), _zero_point(b))


def _zero_point(b: Builder) -> ir.Value:
    return b.constant(np.uint8(ZERO_POINT))


def int_matmul(b: Builder, x: ir.Value, weight: ir.Value) -> ir.Value:
    # MatMulInteger subtracts the zero point before it multiplies: exactly the product of the int8 values
    return _product(b, x, b.op("Transpose", weight, perm=[1, 0]))


def _product(b: Builder, x: ir.Value, columns: ir.Value) -> ir.Value:
    """With both zero points: onnxruntime 1.23 ends itself without the weight's, if session.x64quantprecision is set."""
    # its own zero points: onnxruntime renames those of weights for x64quantprecision, and fails at a shared one
    zero_points = b.own_constant(np.uint8(ZERO_POINT)), b.own_constant(np.int8(0))
    return b.op("MatMulInteger", x, columns, *zero_points)


def int4_matmul(b: Builder, x: ir.Value, weight: ir.Value, weight_scale_second: ir.Value | None) -> ir.Value:
    return _product(b, x, int4_columns(b, last(x), weight, weight_scale_second))


def int4_columns(b: Builder, features: int, weight: ir.Value, weight_scale_second: ir.Value | None) -> ir.Value:
    """INT8 [k, n] of weight INT4 (or widened to INT8) [n/2, k, 2]: packed bytes, rows 2i and 2i + 1 in one of them.

    It takes as few steps as possible: constant folding in onnxruntime keeps the result of each step.
    """
    columns = b.op("Transpose", b.cast(weight, ir.DataType.INT8), perm=[1, 0, 2])
    if weight_scale_second is not None:
        groups = last(weight_scale_second)
        columns = b.op("Reshape", columns, b.ints(groups, features // groups, -1))
        scale = b.op("Unsqueeze", b.op("Transpose", weight_scale_second, perm=[1, 0]), b.ints(1))
        columns = b.op("Mul", columns, b.op("Cast", scale, to=int(ir.DataType.INT8)))
    return b.op("Reshape", columns, b.ints(features, -1))


def dequantize_static(b: Builder, acc: ir.Value, deq_scale: ir.Value, quant_bias: ir.Value) -> ir.Value:
    # Identity: the data propagation of onnx refuses a sum with an integer initializer whose data are external
    biased = b.op("Add", acc, b.op("Identity", quant_bias))
    return b.op("Mul", b.op("Cast", biased, to=int(FLOAT)), low_words(b, deq_scale))


def low_words(b: Builder, deq_scale: ir.Value) -> ir.Value:
    """FLOAT [n] of deq_scale FLOAT [n], or FLOAT [n, 2] over the words of an int64: float32 in the low one, then 0."""
    assert deq_scale.shape is not None
    if len(deq_scale.shape) == 2:
        return b.op("Gather", deq_scale, b.constant(np.int64(0)), axis=1)
    return deq_scale


def dequantize_per_token(
    b: Builder, acc: ir.Value, x_scale: ir.Value, weight_scale: ir.Value, bias: ir.Value | None
) -> ir.Value:
    scaled = b.op("Mul", b.op("Cast", acc, to=int(FLOAT)), b.op("Squeeze", weight_scale, b.ints(-1)))
    result = b.op("Mul", scaled, x_scale)
    return result if bias is None else b.op("Add", result, b.float(bias))


BODIES: dict[Any, Body] = {
    ops.quantize_static: quantize_static,
    ops.quantize_per_token: quantize_per_token,
    ops.int_matmul: int_matmul,
    ops.int4_matmul: int4_matmul,
    ops.dequantize_static: dequantize_static,
    ops.dequantize_per_token: dequantize_per_token,
}

VIEWS: dict[Any, View] = {
    (ops.int4_matmul, "weight"): View.INT4_PAIRS,
    (ops.grouped_int4_matmul, "weight"): View.INT4_PAIRS,
    (ops.dequantize_static, "deq_scale"): View.FLOAT_WORDS,
}
"""Operator and argument → how the bytes of a stored tensor are declared, if not as they are stored."""
