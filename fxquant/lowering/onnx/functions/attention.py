"""Function bodies of the operators in `fxquant.ops.attention`."""

from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import FLOAT, Body, Builder

HEADS_FIRST = [0, 2, 1, 3]


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
    scores = b.op("MatMul", q_nope, b.op("Transpose", k_nope, perm=[0, 1, 3, 2]))
    shared = b.op("Unsqueeze", b.op("Transpose", k_rope, perm=[0, 2, 1]), b.ints(1))
    scores = b.op("Add", scores, b.op("MatMul", q_rope, shared))
    context = b.op("MatMul", _softmax(b, scores, _visible(b, attention_mask, q), softmax_scale), value)
    return b.reshape_last(b.op("Transpose", context, perm=HEADS_FIRST), 2, num_heads * v_head_dim)


def attend_latents(
    b: Builder, q: ir.Value, c_kv: ir.Value, k_rope: ir.Value, kv_b_weight: ir.Value, attention_mask: ir.Value,
    num_heads: int, v_head_dim: int, softmax_scale: float,
) -> ir.Value:  # fmt: skip
    """Keys and values of all T positions are formed, or W_UK and W_UV absorbed: whichever takes fewer products.

    Per head, forming takes T·rank·(nope + v) + S·T·(nope + rope + v) products, absorbing S·rank·(nope + v)
    + S·T·(2·rank + rope).
    Both read W_UK [H, nope, rank] and W_UV [H, v, rank] as they are stored, so that neither needs a copy of its own.
    """
    rank, width = last(c_kv), last(k_rope)
    nope = last(q) // num_heads - width
    queries = b.op("Transpose", b.reshape_last(q, 1, num_heads, nope + width), perm=HEADS_FIRST)
    q_nope, q_rope = b.split_last(queries, nope, width)
    halves = b.op("Reshape", b.float(kv_b_weight), b.ints(num_heads, nope + v_head_dim, rank))
    w_uk, w_uv = b.ops("Split", halves, b.ints(nope, v_head_dim), outputs=2, axis=1)
    latents = b.op("Unsqueeze", c_kv, b.ints(1))
    columns = b.op("Unsqueeze", b.op("Transpose", c_kv, perm=[0, 2, 1]), b.ints(1))
    rope_columns = b.op("Unsqueeze", b.op("Transpose", k_rope, perm=[0, 2, 1]), b.ints(1))
    visible = _visible(b, attention_mask, q)

    def weights(inner: Builder, scores: ir.Value) -> ir.Value:
        # its own product in each branch: OpenVINO 2026.4 adds to a value from outside in place
        return _softmax(
            inner, inner.op("Add", scores, inner.op("MatMul", q_rope, rope_columns)), visible, softmax_scale
        )

    def flat(inner: Builder, context: ir.Value, perm: list[int]) -> ir.Value:
        return inner.reshape_last(inner.op("Transpose", context, perm=perm), 2, num_heads * v_head_dim)

    def formed(inner: Builder) -> ir.Value:
        probabilities = weights(inner, inner.op("MatMul", q_nope, inner.op("MatMul", w_uk, columns)))
        values = inner.op("Transpose", inner.op("MatMul", w_uv, columns), perm=[0, 1, 3, 2])
        return flat(inner, inner.op("MatMul", probabilities, values), HEADS_FIRST)

    def absorbed(inner: Builder) -> ir.Value:
        probabilities = weights(inner, inner.op("MatMul", inner.op("MatMul", q_nope, w_uk), columns))
        context = inner.op("Transpose", inner.op("MatMul", probabilities, latents), perm=[0, 1, 3, 2])
        return flat(inner, inner.op("MatMul", w_uv, context), [0, 3, 1, 2])

    total, new = b.size(attention_mask, 1), b.size(q, 1)
    extra = b.op("Mul", b.op("Mul", new, total), b.ints(2 * rank - nope - v_head_dim))
    saved = b.op("Mul", b.op("Sub", total, new), b.ints(rank * (nope + v_head_dim)))
    return b.either(b.op("Less", extra, saved), "absorbed", absorbed, "formed", formed)


def _softmax(b: Builder, scores: ir.Value, visible: ir.Value, softmax_scale: float) -> ir.Value:
    # not -inf: a query that sees no key would get NaN
    lowest = b.number(float(np.finfo(np.float32).min))
    return b.op("Softmax", b.op("Where", visible, b.op("Mul", scores, b.number(softmax_scale)), lowest), axis=-1)


def _visible(b: Builder, attention_mask: ir.Value, q: ir.Value) -> ir.Value:
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
    ops.attend_latents: attend_latents,
}
