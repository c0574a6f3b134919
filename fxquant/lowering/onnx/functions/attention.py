"""Function bodies of the operators in `fxquant.ops.attention`."""

from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import FLOAT, Body, Builder

HEADS_FIRST = [0, 2, 1, 3]
COLUMNS = [0, 1, 3, 2]


def rope_table(b: Builder, position_ids: ir.Value, inv_freq: list[float], scale: float) -> tuple[ir.Value, ...]:
    position = b.op("Unsqueeze", b.op("Cast", position_ids, to=int(FLOAT)), b.ints(-1))
    angle = b.op("Mul", position, b.constant(np.array(inv_freq, dtype=np.float32)))
    angle = b.op("Concat", angle, angle, axis=-1)
    return tuple(b.op("Mul", b.op(curve, angle), b.number(scale)) for curve in ("Cos", "Sin"))


def rope(b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, num_heads: int) -> ir.Value:
    features, width = last(x), last(cos)
    head = features // num_heads
    heads = b.reshape_last(x, 1, num_heads, head)
    unrotated, rotary = b.split_last(heads, head - width, width) if head > width else (None, heads)
    first, second = (b.op("Slice", rotary, b.ints(start), b.ints(width), b.ints(-1), b.ints(2)) for start in (0, 1))
    halves = b.op("Concat", first, second, axis=-1)
    rotated = b.op("Concat", b.op("Neg", second), first, axis=-1)
    cos, sin = (b.op("Unsqueeze", table, b.ints(-2)) for table in (cos, sin))
    result = b.op("Add", b.op("Mul", halves, cos), b.op("Mul", rotated, sin))
    return b.reshape_last(result if unrotated is None else b.op("Concat", unrotated, result, axis=-1), 2, features)


def mla_attention(
    b: Builder, q: ir.Value, kv: ir.Value, k_rope: ir.Value, attention_mask: ir.Value, num_heads: int, v_head_dim: int,
    softmax_scale: float,
) -> ir.Value:  # fmt: skip
    head, width = last(q) // num_heads, last(k_rope)
    queries = b.op("Transpose", b.reshape_last(q, 1, num_heads, head), perm=HEADS_FIRST)
    q_nope, q_rope = b.split_last(queries, head - width, width)
    keys = b.op("Transpose", b.reshape_last(kv, 1, num_heads, head - width + v_head_dim), perm=HEADS_FIRST)
    k_nope, value = b.split_last(keys, head - width, v_head_dim)
    scores = b.op("MatMul", q_nope, b.op("Transpose", k_nope, perm=COLUMNS))
    shared = b.op("Unsqueeze", b.op("Transpose", k_rope, perm=[0, 2, 1]), b.ints(1))
    scores = b.op("Add", scores, b.op("MatMul", q_rope, shared))
    context = b.op("MatMul", softmax(b, scores, visible_keys(b, attention_mask, q), softmax_scale), value)
    return b.reshape_last(b.op("Transpose", context, perm=HEADS_FIRST), 2, num_heads * v_head_dim)


def softmax(b: Builder, scores: ir.Value, visible: ir.Value, softmax_scale: float) -> ir.Value:
    """Of scores times the scale, over the visible keys."""
    # not -inf: a query that sees no key would get NaN
    lowest = b.number(float(np.finfo(np.float32).min))
    return b.op("Softmax", b.op("Where", visible, b.op("Mul", scores, b.number(softmax_scale)), lowest), axis=-1)


def visible_keys(b: Builder, attention_mask: ir.Value, q: ir.Value) -> ir.Value:
    """Bool [B, 1, S, T]: the keys that a query may see."""
    zero, step = b.constant(np.int64(0)), b.constant(np.int64(1))
    total = b.op("Gather", b.op("Shape", attention_mask), step, axis=0)
    new = b.op("Gather", b.op("Shape", q), step, axis=0)
    keys = b.op("Range", zero, total, step)
    last_key = b.op("Unsqueeze", b.op("Range", b.op("Sub", total, new), total, step), b.ints(1))
    present = b.op("Unsqueeze", b.op("Cast", attention_mask, to=int(ir.DataType.BOOL)), b.ints(1, 2))
    return b.op("And", b.op("LessOrEqual", keys, last_key), present)


def last(value: ir.Value) -> int:
    """The width of `value`, fixed in every graph."""
    assert value.shape is not None and isinstance(value.shape[-1], int)
    return value.shape[-1]


BODIES: dict[Any, Body] = {
    ops.rope_table: rope_table,
    ops.rope: rope,
    ops.mla_attention: mla_attention,
}
