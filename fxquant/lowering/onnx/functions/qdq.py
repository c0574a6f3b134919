"""Function bodies of the joined linears: QuantizeLinear and DequantizeLinear around a MatMul of floats.

What comes out of DequantizeLinear is a scale times an integer. Codes per token are integers themselves, scale 1, and
the token's scale multiplies the result: backends fuse such a product to one of integers, and onnxruntime's then equals
the steps of the references bit for bit. int4 weights become int8 before their DequantizeLinear, with the group scales
multiplied in as integers, so that one scale per channel is left.
"""

from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import FLOAT, ZERO_POINT, Body, Builder
from fxquant.lowering.onnx.functions.attention import last
from fxquant.lowering.onnx.functions.quantized import int4_columns, low_words
from fxquant.lowering.onnx.initializers import View

INT32, UINT8 = ir.DataType.INT32, ir.DataType.UINT8


def static_linear(
    b: Builder, x: ir.Value, weight: ir.Value, input_scale: ir.Value, input_offset: ir.Value, deq_scale: ir.Value,
    quant_bias: ir.Value, biased: bool,
) -> ir.Value:  # fmt: skip
    """The weight's scale is `deq_scale / input_scale`; DequantizeLinear takes the zero point out of x, not the bias."""
    step = b.op("Squeeze", b.float(input_scale))
    offset = b.op("Squeeze", b.float(input_offset))
    zero_point = b.op("Cast", b.op("Add", offset, b.number(ZERO_POINT)), to=int(UINT8))
    scale = low_words(b, deq_scale)
    codes = b.op("QuantizeLinear", x, step, zero_point)
    y = _product(b, b.op("DequantizeLinear", codes, step, zero_point), weight, b.op("Div", scale, step))
    if not biased:
        return y
    sums = b.op("ReduceSum", b.op("Cast", weight, to=int(INT32)), b.ints(-1), keepdims=0)
    bias = b.op("Add", b.op("Identity", quant_bias), b.op("Mul", b.op("Cast", offset, to=int(INT32)), sums))
    return b.op("Add", y, b.op("DequantizeLinear", bias, scale, axis=0))


def per_token_linear(
    b: Builder, x: ir.Value, x_scale: ir.Value, weight: ir.Value, weight_scale: ir.Value, bias: ir.Value | None
) -> ir.Value:
    scale = b.op("Squeeze", b.float(weight_scale), b.ints(-1))
    return _of_rows(b, _product(b, _codes(b, x), weight, scale), x_scale, bias)


def per_token_int4_linear(
    b: Builder, x: ir.Value, x_scale: ir.Value, weight: ir.Value, weight_scale: ir.Value,
    weight_scale_second: ir.Value | None, bias: ir.Value | None,
) -> ir.Value:  # fmt: skip
    scale = b.op("Squeeze", b.float(weight_scale), b.ints(-1))
    columns = _floats(b, int4_columns(b, last(x), weight, weight_scale_second), scale)
    return _of_rows(b, b.op("MatMul", _codes(b, x), columns), x_scale, bias)


def _codes(b: Builder, x: ir.Value) -> ir.Value:
    return b.op("DequantizeLinear", x, b.number(1), b.constant(np.uint8(ZERO_POINT)))


def _product(b: Builder, x: ir.Value, weight: ir.Value, scale: ir.Value) -> ir.Value:
    # transposed before: onnxruntime 1.23 puts a QuantizeLinear of the wrong type behind a Transpose of floats
    return b.op("MatMul", x, _floats(b, b.op("Transpose", weight, perm=[1, 0]), scale))


def _floats(b: Builder, columns: ir.Value, scale: ir.Value) -> ir.Value:
    """Of int8 [k, n]. Without zero points onnxruntime 1.23 ends itself if session.x64quantprecision is set."""
    zero_points = b.op("ConstantOfShape", b.op("Shape", scale), value=ir.tensor(np.array([0], dtype=np.int8)))
    return b.op("DequantizeLinear", columns, scale, zero_points, axis=1)


def _of_rows(b: Builder, y: ir.Value, x_scale: ir.Value, bias: ir.Value | None) -> ir.Value:
    y = b.op("Mul", y, x_scale)
    return y if bias is None else b.op("Add", y, b.cast(bias, FLOAT))


BODIES: dict[Any, Body] = {
    ops.static_linear: static_linear,
    ops.per_token_linear: per_token_linear,
    ops.per_token_int4_linear: per_token_int4_linear,
}

VIEWS: dict[Any, View] = {
    (ops.static_linear, "deq_scale"): View.FLOAT_WORDS,
    (ops.per_token_int4_linear, "weight"): View.INT4_PAIRS,
    (ops.grouped_int4_linear, "weight"): View.INT4_PAIRS,
}
