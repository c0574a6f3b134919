"""aten operators that compute; operands are cast to the dtype of the result, as torch promotes them."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from fxquant.lowering.onnx.aten_shape import Lower, Result, axis, rank
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
        # ONNX compares only equal dtypes: promote as torch does
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
    """Softmax and LogSoftmax: one axis, as an attribute."""
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


def einsum(b: Builder, out: Result, equation: str, tensors: Sequence[ir.Value], path: None = None) -> ir.Value:
    return b.op("Einsum", *tensors, equation=equation)


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
    """And and Or; for integers BitwiseAnd and BitwiseOr."""

    def lower(b: Builder, out: Result, x: Operand, other: Operand) -> ir.Value:
        op_type = word if out.dtype is ir.DataType.BOOL else f"Bitwise{word}"
        return b.op(op_type, operand(b, x, out.dtype), operand(b, other, out.dtype))

    return lower


def logical_not(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Not", b.cast(x, ir.DataType.BOOL))


def bitwise_not(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Not" if out.dtype is ir.DataType.BOOL else "BitwiseNot", x)
