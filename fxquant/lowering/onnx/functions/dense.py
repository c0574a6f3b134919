"""Function bodies of the operators in `fxquant.ops.dense`."""

from typing import Any

import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import FLOAT, Body, Builder


def embedding(b: Builder, weight: ir.Value, ids: ir.Value) -> ir.Value:
    """Rows are widened after the gather: the table stays in its stored dtype."""
    rows = b.op("Gather", weight, ids, axis=0)
    return rows if weight.dtype == FLOAT else b.float(rows)


def linear(b: Builder, x: ir.Value, weight: ir.Value, bias: ir.Value | None) -> ir.Value:
    product = b.op("MatMul", x, b.op("Transpose", b.float(weight), perm=[1, 0]))
    return product if bias is None else b.op("Add", product, b.float(bias))


def rms_norm(b: Builder, x: ir.Value, weight: ir.Value, eps: float, bias: ir.Value | None) -> ir.Value:
    mean = b.op("ReduceMean", b.op("Mul", x, x), b.ints(-1), keepdims=1)
    scale = b.op("Div", b.number(1), b.op("Sqrt", b.op("Add", mean, b.number(eps))))
    normed = b.op("Mul", b.op("Mul", x, scale), b.float(weight))
    return normed if bias is None else b.op("Add", normed, b.float(bias))


def swiglu(b: Builder, gate: ir.Value, up: ir.Value) -> ir.Value:
    return b.op("Mul", b.silu(gate), up)


BODIES: dict[Any, Body] = {
    ops.embedding: embedding,
    ops.linear: linear,
    ops.rms_norm: rms_norm,
    ops.swiglu: swiglu,
}
