"""Function body of attention over cached latents: keys and values formed, or kv_b_proj absorbed, as a call decides."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import Body, Builder
from fxquant.lowering.onnx.functions.attention import HEADS_FIRST, last, softmax, visible_keys


@dataclass(frozen=True)
class _Operands:
    """What both orders of products read.

    q_nope, q_rope         [B, H, S, …]
    w_uk, w_uv             [H, nope, rank], [H, v, rank], as they are stored: neither order needs a copy of its own
    latents, columns       [B, 1, T, rank], [B, 1, rank, T]
    rope_columns, visible  [B, 1, rope, T]; bool [B, 1, S, T]
    """

    q_nope: ir.Value
    q_rope: ir.Value
    w_uk: ir.Value
    w_uv: ir.Value
    latents: ir.Value
    columns: ir.Value
    rope_columns: ir.Value
    visible: ir.Value
    softmax_scale: float
    features: int

    def formed(self, b: Builder) -> ir.Value:
        """Keys and values of all positions."""
        probabilities = self._weights(b, b.op("MatMul", self.q_nope, b.op("MatMul", self.w_uk, self.columns)))
        values = b.op("Transpose", b.op("MatMul", self.w_uv, self.columns), perm=[0, 1, 3, 2])
        return self._flat(b, b.op("MatMul", probabilities, values), HEADS_FIRST)

    def absorbed(self, b: Builder) -> ir.Value:
        """The weight goes to queries and context."""
        probabilities = self._weights(b, b.op("MatMul", b.op("MatMul", self.q_nope, self.w_uk), self.columns))
        context = b.op("Transpose", b.op("MatMul", probabilities, self.latents), perm=[0, 1, 3, 2])
        return self._flat(b, b.op("MatMul", self.w_uv, context), [0, 3, 1, 2])

    def _weights(self, b: Builder, scores: ir.Value) -> ir.Value:
        # a product in each branch: to one from outside OpenVINO 2026.4 adds in place, and others read it
        rotary = b.op("MatMul", self.q_rope, self.rope_columns)
        return softmax(b, b.op("Add", scores, rotary), self.visible, self.softmax_scale)

    def _flat(self, b: Builder, context: ir.Value, perm: list[int]) -> ir.Value:
        return b.reshape_last(b.op("Transpose", context, perm=perm), 2, self.features)


def attend_latents(
    b: Builder, q: ir.Value, c_kv: ir.Value, k_rope: ir.Value, kv_b_weight: ir.Value, attention_mask: ir.Value,
    num_heads: int, v_head_dim: int, softmax_scale: float,
) -> ir.Value:  # fmt: skip
    """Whichever takes fewer products. Per head, where keys and values are formed, these are T·rank·(nope + v)
    + S·T·(nope + rope + v), where the weight is absorbed S·rank·(nope + v) + S·T·(2·rank + rope)."""
    rank, width = last(c_kv), last(k_rope)
    nope = last(q) // num_heads - width
    queries = b.op("Transpose", b.reshape_last(q, 1, num_heads, nope + width), perm=HEADS_FIRST)
    halves = b.op("Reshape", b.float(kv_b_weight), b.ints(num_heads, nope + v_head_dim, rank))
    q_nope, q_rope = b.split_last(queries, nope, width)
    w_uk, w_uv = b.ops("Split", halves, b.ints(nope, v_head_dim), outputs=2, axis=1)
    latents, columns, rope_columns = b.op("Unsqueeze", c_kv, b.ints(1)), _columns(b, c_kv), _columns(b, k_rope)
    visible, features = visible_keys(b, attention_mask, q), num_heads * v_head_dim
    operands = _Operands(q_nope, q_rope, w_uk, w_uv, latents, columns, rope_columns, visible, softmax_scale, features)
    total, new = b.size(attention_mask, 1), b.size(q, 1)
    extra = b.op("Mul", b.op("Mul", new, total), b.ints(2 * rank - nope - v_head_dim))
    saved = b.op("Mul", b.op("Sub", total, new), b.ints(rank * (nope + v_head_dim)))
    return b.either(b.op("Less", extra, saved), "absorbed", operands.absorbed, "formed", operands.formed)


def _columns(b: Builder, rows: ir.Value) -> ir.Value:
    """[B, T, …] → [B, 1, …, T]"""
    return b.op("Unsqueeze", b.op("Transpose", rows, perm=[0, 2, 1]), b.ints(1))


BODIES: dict[Any, Body] = {ops.attend_latents: attend_latents}
