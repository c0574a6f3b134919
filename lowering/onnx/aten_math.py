"""aten operators that compute; operands are brought to the dtype of the result, as torch promotes them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant.lowering.onnx.aten_shape import ATEN, Lower, Result, axis, rank
from fxquant.lowering.onnx.builder import Builder, Size

Number = float | bool
Operand = ir.Value | float | bool


def operand(b: Builder, value: Operand, dtype: ir.DataType) -> ir.Value:
    """A value or a Python number as a tensor of `dtype`."""
    if isinstance(value, ir.Value):
        return b.cast(value, dtype)
    return b.constant(np.asarray(value, dtype=dtype.numpy()))


def unary(op_type: str) -> Lower:
    return lambda b, out, x: b.op(op_type, b.cast(x, out.dtype))


def binary(op_type: str) -> Lower:
    return lambda b, out, x, other: b.op(op_type, operand(b, x, out.dtype), operand(b, other, out.dtype))


def scaled(op_type: str) -> Lower:
    """Add or Sub, with torch's factor `alpha` on the second operand."""

    def lower(b: Builder, out: Result, x: Operand, other: Operand, alpha: float) -> ir.Value:
        second = operand(b, other, out.dtype)
        if alpha != 1:
            second = b.op("Mul", second, operand(b, alpha, out.dtype))
        return b.op(op_type, operand(b, x, out.dtype), second)

    return lower


def rsub(b: Builder, out: Result, x: ir.Value, other: Operand, alpha: float) -> ir.Value:
    return scaled("Sub")(b, out, other, x, alpha)


def power(b: Builder, out: Result, x: Operand, exponent: Operand) -> ir.Value:
    return b.op("Pow", operand(b, x, out.dtype), operand(b, exponent, out.dtype))


def compare(op_type: str) -> Lower:
    def lower(b: Builder, out: Result, x: ir.Value, other: Operand) -> ir.Value:
        dtypes = [v.dtype for v in (x, other) if isinstance(v, ir.Value) and v.dtype is not None]
        wide = isinstance(other, float) and not isinstance(other, bool)
        floats = [dtype for dtype in dtypes if dtype.is_floating_point()]
        dtype = floats[0] if floats else (ir.DataType.FLOAT if wide else max(dtypes, key=lambda d: d.bitwidth))
        return b.op(op_type, operand(b, x, dtype), operand(b, other, dtype))

    return lower


def differ(b: Builder, out: Result, x: ir.Value, other: Operand) -> ir.Value:
    return b.op("Not", compare("Equal")(b, out, x, other))


def where(b: Builder, out: Result, condition: ir.Value, x: Operand, other: Operand) -> ir.Value:
    return b.op("Where", condition, operand(b, x, out.dtype), operand(b, other, out.dtype))


def masked_fill(b: Builder, out: Result, x: ir.Value, mask: ir.Value, value: Operand) -> ir.Value:
    return b.op("Where", mask, operand(b, value, out.dtype), x)


def rsqrt(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Div", operand(b, 1, out.dtype), b.op("Sqrt", x))


def sigmoid(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.sigmoid(b.cast(x, out.dtype))


def silu(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.silu(x)


def gelu(b: Builder, out: Result, x: ir.Value, approximate: str) -> ir.Value:
    return b.op("Gelu", x, approximate=approximate)


def clamp(b: Builder, out: Result, x: ir.Value, min: Number | None, max: Number | None) -> ir.Value:  # noqa: A002
    bounds = [None if bound is None else operand(b, bound, out.dtype) for bound in (min, max)]
    return b.op("Clip", b.cast(x, out.dtype), *bounds)


def clamp_min(b: Builder, out: Result, x: ir.Value, min: Number) -> ir.Value:  # noqa: A002
    return clamp(b, out, x, min, None)


def clamp_max(b: Builder, out: Result, x: ir.Value, max: Number) -> ir.Value:  # noqa: A002
    return clamp(b, out, x, None, max)


def reduce(op_type: str) -> Lower:
    def lower(b: Builder, out: Result, x: ir.Value, dim: Sequence[int] | int | None, keepdim: bool) -> ir.Value:
        dims = [dim] if isinstance(dim, int) else dim or range(rank(x))
        return b.op(op_type, b.cast(x, out.dtype), b.ints(*dims), keepdims=int(keepdim))

    return lower


def reduce_all(op_type: str) -> Lower:
    return lambda b, out, x: b.op(op_type, b.cast(x, out.dtype), keepdims=0)


def along(op_type: str) -> Lower:
    """Softmax and its like: one axis, as an attribute."""
    return lambda b, out, x, dim: b.op(op_type, b.cast(x, out.dtype), axis=dim)


def cumsum(b: Builder, out: Result, x: ir.Value, dim: int) -> ir.Value:
    return b.op("CumSum", b.cast(x, out.dtype), b.constant(np.int64(dim)))


def topk(b: Builder, out: Result, x: ir.Value, k: Size, dim: int, largest: bool, sorted: bool) -> tuple:  # noqa: A002
    return b.ops("TopK", x, b.sizes(k), outputs=2, axis=dim, largest=int(largest), sorted=int(sorted))


def arg_extreme(op_type: str) -> Lower:
    def lower(b: Builder, out: Result, x: ir.Value, dim: int | None, keepdim: bool) -> ir.Value:
        if dim is None:
            raise ValueError("has no dim")
        return b.op(op_type, x, axis=dim, keepdims=int(keepdim))

    return lower


def cat(b: Builder, out: Result, tensors: Sequence[ir.Value], dim: int) -> ir.Value:
    return b.op("Concat", *(b.cast(tensor, out.dtype) for tensor in tensors), axis=dim)


def stack(b: Builder, out: Result, tensors: Sequence[ir.Value], dim: int) -> ir.Value:
    at = b.ints(axis(dim, out.rank))
    parts = [b.op("Unsqueeze", b.cast(tensor, out.dtype), at) for tensor in tensors]
    return b.op("Concat", *parts, axis=axis(dim, out.rank))


def matmul(b: Builder, out: Result, x: ir.Value, other: ir.Value) -> ir.Value:
    return b.op("MatMul", x, other)


def batched_matmul(b: Builder, out: Result, x: ir.Value, mat2: ir.Value) -> ir.Value:
    return b.op("MatMul", x, mat2)


def layer_norm(
    b: Builder, out: Result, x: ir.Value, normalized_shape: Sequence[int], weight: ir.Value | None,
    bias: ir.Value | None, eps: float,
) -> ir.Value:  # fmt: skip
    scale = weight if weight is not None else b.constant(np.ones(tuple(normalized_shape), dtype=out.dtype.numpy()))
    return b.op("LayerNormalization", x, scale, bias, axis=-len(normalized_shape), epsilon=eps)


def convert(b: Builder, out: Result, x: ir.Value, other: ir.Value | None = None) -> ir.Value:
    return b.cast(x, out.dtype)


def full(b: Builder, out: Result, size: Sequence[Size], fill_value: float) -> ir.Value:
    return b.op("Expand", operand(b, fill_value, out.dtype), b.sizes(*size))


def full_like(b: Builder, out: Result, x: ir.Value, fill_value: float) -> ir.Value:
    return b.op("Expand", operand(b, fill_value, out.dtype), b.op("Shape", x))


def filled(value: int) -> Lower:
    return lambda b, out, size: full(b, out, size, value)


def new_filled(value: int) -> Lower:
    return lambda b, out, x, size: full(b, out, size, value)


def filled_like(value: int) -> Lower:
    return lambda b, out, x: full_like(b, out, x, value)


def arange(b: Builder, out: Result, end: Size, start: Size = 0, step: int = 1) -> ir.Value:
    bounds = [b.op("Squeeze", b.sizes(size), b.ints(0)) for size in (start, end)]
    return b.cast(b.op("Range", *bounds, b.constant(np.int64(step))), out.dtype)


def logical(op_type: str) -> Lower:
    return lambda b, out, x, other: b.op(op_type, *(operand(b, v, ir.DataType.BOOL) for v in (x, other)))


def bitwise(word: str) -> Lower:
    """And and Or; on numbers BitwiseAnd and BitwiseOr."""

    def lower(b: Builder, out: Result, x: Operand, other: Operand) -> ir.Value:
        op_type = word if out.dtype is ir.DataType.BOOL else f"Bitwise{word}"
        return b.op(op_type, operand(b, x, out.dtype), operand(b, other, out.dtype))

    return lower


def logical_not(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Not", b.cast(x, ir.DataType.BOOL))


def bitwise_not(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Not" if out.dtype is ir.DataType.BOOL else "BitwiseNot", x)


MATH_OPERATORS: dict[Any, Lower] = {
    ATEN.add.Tensor: scaled("Add"),
    ATEN.add.Scalar: scaled("Add"),
    ATEN.sub.Tensor: scaled("Sub"),
    ATEN.sub.Scalar: scaled("Sub"),
    ATEN.rsub.Scalar: rsub,
    ATEN.rsub.Tensor: rsub,
    ATEN.mul.Tensor: binary("Mul"),
    ATEN.mul.Scalar: binary("Mul"),
    ATEN.div.Tensor: binary("Div"),
    ATEN.div.Scalar: binary("Div"),
    ATEN.maximum.default: binary("Max"),
    ATEN.minimum.default: binary("Min"),
    ATEN.pow.Tensor_Scalar: power,
    ATEN.pow.Tensor_Tensor: power,
    ATEN.pow.Scalar: power,
    ATEN.neg.default: unary("Neg"),
    ATEN.sqrt.default: unary("Sqrt"),
    ATEN.rsqrt.default: rsqrt,
    ATEN.reciprocal.default: unary("Reciprocal"),
    ATEN.exp.default: unary("Exp"),
    ATEN.log.default: unary("Log"),
    ATEN.sin.default: unary("Sin"),
    ATEN.cos.default: unary("Cos"),
    ATEN.erf.default: unary("Erf"),
    ATEN.tanh.default: unary("Tanh"),
    ATEN.sigmoid.default: sigmoid,
    ATEN.silu.default: silu,
    ATEN.gelu.default: gelu,
    ATEN.relu.default: unary("Relu"),
    ATEN.softplus.default: unary("Softplus"),
    ATEN.abs.default: unary("Abs"),
    ATEN.sign.default: unary("Sign"),
    ATEN.floor.default: unary("Floor"),
    ATEN.ceil.default: unary("Ceil"),
    ATEN.round.default: unary("Round"),
    ATEN.clamp.default: clamp,
    ATEN.clamp_min.default: clamp_min,
    ATEN.clamp_max.default: clamp_max,
    ATEN.mean.dim: reduce("ReduceMean"),
    ATEN.mean.default: reduce_all("ReduceMean"),
    ATEN.sum.dim_IntList: reduce("ReduceSum"),
    ATEN.sum.default: reduce_all("ReduceSum"),
    ATEN.amax.default: reduce("ReduceMax"),
    ATEN.amin.default: reduce("ReduceMin"),
    ATEN.softmax.int: along("Softmax"),
    ATEN.log_softmax.int: along("LogSoftmax"),
    ATEN.cumsum.default: cumsum,
    ATEN.topk.default: topk,
    ATEN.argmax.default: arg_extreme("ArgMax"),
    ATEN.argmin.default: arg_extreme("ArgMin"),
    ATEN.cat.default: cat,
    ATEN.stack.default: stack,
    ATEN.matmul.default: matmul,
    ATEN.mm.default: batched_matmul,
    ATEN.bmm.default: batched_matmul,
    ATEN.layer_norm.default: layer_norm,
    ATEN._to_copy.default: convert,
    ATEN.to.dtype: convert,
    ATEN.to.dtype_layout: convert,
    ATEN.to.other: convert,
    ATEN.type_as.default: convert,
    ATEN.where.self: where,
    ATEN.where.ScalarOther: where,
    ATEN.where.ScalarSelf: where,
    ATEN.where.Scalar: where,
    ATEN.masked_fill.Scalar: masked_fill,
    ATEN.eq.Scalar: compare("Equal"),
    ATEN.eq.Tensor: compare("Equal"),
    ATEN.ne.Scalar: differ,
    ATEN.ne.Tensor: differ,
    ATEN.lt.Scalar: compare("Less"),
    ATEN.lt.Tensor: compare("Less"),
    ATEN.le.Scalar: compare("LessOrEqual"),
    ATEN.le.Tensor: compare("LessOrEqual"),
    ATEN.gt.Scalar: compare("Greater"),
    ATEN.gt.Tensor: compare("Greater"),
    ATEN.ge.Scalar: compare("GreaterOrEqual"),
    ATEN.ge.Tensor: compare("GreaterOrEqual"),
    ATEN.logical_not.default: logical_not,
    ATEN.bitwise_not.default: bitwise_not,
    ATEN.bitwise_and.Tensor: bitwise("And"),
    ATEN.bitwise_or.Tensor: bitwise("Or"),
    ATEN.__and__.Tensor: bitwise("And"),
    ATEN.__or__.Tensor: bitwise("Or"),
    ATEN.logical_and.default: logical("And"),
    ATEN.logical_or.default: logical("Or"),
    ATEN.full.default: full,
    ATEN.ones.default: filled(1),
    ATEN.zeros.default: filled(0),
    ATEN.new_ones.default: new_filled(1),
    ATEN.new_zeros.default: new_filled(0),
    ATEN.full_like.default: full_like,
    ATEN.ones_like.default: filled_like(1),
    ATEN.zeros_like.default: filled_like(0),
    ATEN.arange.default: arange,
    ATEN.arange.start: arange,
}
