"""Function bodies of attention over cached latents: keys and values are formed, or kv_b_proj absorbed, by the call."""

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import Body, Builder
from fxquant.lowering.onnx.functions.attention import COLUMNS, HEADS_FIRST, last, softmax, visible_keys


@dataclass(frozen=True)
class _Operands:
    """What both orders of products read. H heads, S queries, T latents (c_kv, k_rope) of rank + rope numbers.

    q_nope, q_rope  [B, H, S, …]
    w_uk, w_uv      [H, nope, rank], [H, rank, v]: both orders multiply by them as they are: one copy of each
    parts           [B, 1, T, …], which side by side are the latents
    visible         bool [B, 1, S, T]; `new`, `total`: int64 [1], S and T
    """

    q_nope: ir.Value
    q_rope: ir.Value
    w_uk: ir.Value
    w_uv: ir.Value
    parts: tuple[ir.Value, ir.Value]
    widths: tuple[int, int]
    visible: ir.Value
    new: ir.Value
    total: ir.Value
    num_heads: int
    v_head_dim: int
    rank: int
    softmax_scale: float

    @property
    def rope(self) -> int:
        return sum(self.widths) - self.rank

    def formed(self, b: Builder) -> ir.Value:
        """Keys and values of all positions."""
        c_kv, k_rope = self._latents(b)
        columns = b.op("Transpose", c_kv, perm=COLUMNS)
        scores = b.op("MatMul", self.q_nope, b.op("MatMul", self.w_uk, columns))
        # a product in each branch: to one from outside OpenVINO 2026.4 adds in place, and others read it
        rotary = b.op("MatMul", self.q_rope, b.op("Transpose", k_rope, perm=COLUMNS))
        weights = softmax(b, b.op("Add", scores, rotary), self.visible, self.softmax_scale)
        return self._flat(b, b.op("MatMul", weights, b.op("MatMul", c_kv, self.w_uv)))

    def absorbed(self, b: Builder) -> ir.Value:
        """The weight goes to queries and context. Heads are rows of one product, which reads the cache once."""
        # two sizes: for a single one onnxruntime puts -1, which a batch without rows does not determine
        batch, number = b.size(self.q_nope, 0), b.op("Mul", self.new, b.ints(self.num_heads))
        queries = b.op("Concat", b.op("MatMul", self.q_nope, self.w_uk), self.q_rope, axis=-1)
        rows = b.split_last(b.op("Reshape", queries, b.sizes(batch, 1, number, sum(self.widths))), *self.widths)
        first, second = (
            b.op("MatMul", row, b.op("Transpose", part, perm=COLUMNS))
            for row, part in zip(rows, self.parts, strict=True)
        )
        scores = b.op("Reshape", b.op("Add", first, second), b.sizes(batch, self.num_heads, self.new, self.total))
        weights = softmax(b, scores, self.visible, self.softmax_scale)
        context = self._context(b, b.op("Reshape", weights, b.sizes(batch, 1, number, self.total)))
        context = b.op("Reshape", context, b.sizes(batch, self.num_heads, self.new, self.rank))
        return self._flat(b, b.op("MatMul", context, self.w_uv))

    def _latents(self, b: Builder) -> tuple[ir.Value, ...]:
        """c_kv and k_rope, [B, 1, T, …]."""
        if self.widths[0] == self.rank:
            return self.parts
        return b.split_last(b.op("Concat", *self.parts, axis=-1), self.rank, self.rope)

    def _context(self, b: Builder, weights: ir.Value) -> ir.Value:
        """[B, 1, H·S, rank], sums of c_kv."""
        first, second = self.parts
        context = b.op("MatMul", weights, first)
        if self.widths[0] == self.rank:
            return context
        context = b.op("Concat", context, b.op("MatMul", weights, second), axis=-1)
        return b.split_last(context, self.rank, self.rope)[0]

    def _flat(self, b: Builder, values: ir.Value) -> ir.Value:
        return b.reshape_last(b.op("Transpose", values, perm=HEADS_FIRST), 2, self.num_heads * self.v_head_dim)


def attend_latents(
    b: Builder, q: ir.Value, c_kv: ir.Value, k_rope: ir.Value, kv_b_weight: ir.Value, attention_mask: ir.Value,
    num_heads: int, v_head_dim: int, softmax_scale: float,
) -> ir.Value:  # fmt: skip
    """Whichever takes fewer products. Per head, where keys and values are formed, these are T·rank·(nope + v)
    + S·T·(nope + rope + v), where the weight is absorbed S·rank·(nope + v) + S·T·(2·rank + rope)."""
    parts = b.op("Unsqueeze", c_kv, b.ints(1)), b.op("Unsqueeze", k_rope, b.ints(1))
    widths = last(c_kv), last(k_rope)
    return _attend(b, q, parts, widths, kv_b_weight, attention_mask, num_heads, v_head_dim, softmax_scale)


def attend_halves(
    b: Builder, q: ir.Value, key: ir.Value, value: ir.Value, kv_b_weight: ir.Value, attention_mask: ir.Value,
    num_heads: int, v_head_dim: int, softmax_scale: float,
) -> ir.Value:  # fmt: skip
    """As `attend_latents`. Where the weight is absorbed, sums are those of a half and are nowhere joined."""
    parts, widths = (key, value), (last(key), last(value))
    return _attend(b, q, parts, widths, kv_b_weight, attention_mask, num_heads, v_head_dim, softmax_scale)


def _attend(
    b: Builder, q: ir.Value, parts: tuple[ir.Value, ir.Value], widths: tuple[int, int], kv_b_weight: ir.Value,
    attention_mask: ir.Value, num_heads: int, v_head_dim: int, softmax_scale: float,
) -> ir.Value:  # fmt: skip
    rank, head = last(kv_b_weight), last(q) // num_heads
    nope = head - (sum(widths) - rank)
    queries = b.op("Transpose", b.reshape_last(q, 1, num_heads, head), perm=HEADS_FIRST)
    heads = b.op("Reshape", b.float(kv_b_weight), b.ints(num_heads, nope + v_head_dim, rank))
    q_nope, q_rope = b.split_last(queries, nope, head - nope)
    w_uk, w_uv = b.ops("Split", heads, b.ints(nope, v_head_dim), outputs=2, axis=1)
    visible, new, total = visible_keys(b, attention_mask, q), b.size(q, 1), b.size(attention_mask, 1)
    numbers = (num_heads, v_head_dim, rank, softmax_scale)
    w_uv = b.op("Transpose", w_uv, perm=[0, 2, 1])
    operands = _Operands(q_nope, q_rope, w_uk, w_uv, parts, widths, visible, new, total, *numbers)
    extra = b.op("Mul", b.op("Mul", new, total), b.ints(2 * rank - nope - v_head_dim))
    saved = b.op("Mul", b.op("Sub", total, new), b.ints(rank * (nope + v_head_dim)))
    return b.either(b.op("Less", extra, saved), "absorbed", operands.absorbed, "formed", operands.formed)


BODIES: dict[Any, Body] = {ops.attend_latents: attend_latents, ops.attend_halves: attend_halves}
