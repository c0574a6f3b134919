"""Function bodies of attention over cached keys and values of all heads."""

from typing import Any

import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import Body, Builder
from fxquant.lowering.onnx.functions.attention import COLUMNS, HEADS_FIRST, last, softmax, visible_keys


def expand_heads(
    b: Builder, kv: ir.Value, k_rope: ir.Value, num_heads: int, v_head_dim: int
) -> tuple[ir.Value, ir.Value]:
    nope = last(kv) // num_heads - v_head_dim
    heads = b.op("Transpose", b.reshape_last(kv, 1, num_heads, nope + v_head_dim), perm=HEADS_FIRST)
    k_nope, value = b.split_last(heads, nope, v_head_dim)
    shared = b.op("Expand", b.op("Unsqueeze", k_rope, b.ints(1)), b.ints(1, num_heads, 1, 1))
    return b.op("Concat", k_nope, shared, axis=-1), value


def attend_heads(
    b: Builder, q: ir.Value, key: ir.Value, value: ir.Value, attention_mask: ir.Value, softmax_scale: float
) -> ir.Value:
    width, features = last(key), last(q)
    num_heads = features // width
    queries = b.op("Transpose", b.reshape_last(q, 1, num_heads, width), perm=HEADS_FIRST)
    scores = b.op("MatMul", queries, b.op("Transpose", key, perm=COLUMNS))
    context = b.op("MatMul", softmax(b, scores, visible_keys(b, attention_mask, q), softmax_scale), value)
    return b.reshape_last(b.op("Transpose", context, perm=HEADS_FIRST), 2, num_heads * last(value))


BODIES: dict[Any, Body] = {
    ops.expand_heads: expand_heads,
    ops.attend_heads: attend_heads,
}
