"""Function bodies of the operators in `fxquant.ops.moe`, except the experts themselves (see `experts`)."""

from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant import ops
from fxquant.lowering.onnx.builder import Body, Builder
from fxquant.lowering.onnx.functions.attention import last


def router_logits(b: Builder, x: ir.Value, weight: ir.Value) -> ir.Value:
    return b.op("MatMul", x, b.op("Transpose", b.float(weight), perm=[1, 0]))


def moe_gate(
    b: Builder, logits: ir.Value, correction_bias: ir.Value, top_k: int, n_group: int, topk_group: int,
    norm_topk_prob: bool, routed_scaling_factor: float,
) -> tuple[ir.Value, ...]:  # fmt: skip
    experts, axis = last(logits), _last_axis(logits)
    scores = b.sigmoid(logits)
    groups = b.reshape_last(b.op("Add", scores, b.float(correction_bias)), 1, n_group, experts // n_group)
    best, _ = b.ops("TopK", groups, b.ints(min(2, experts // n_group)), outputs=2, axis=-1)
    group_scores = b.op("ReduceSum", best, b.ints(-1), keepdims=0)
    _, winners = b.ops("TopK", group_scores, b.ints(topk_group), outputs=2, axis=-1)
    none, all_ = _filled(b, group_scores, np.array([False])), _filled(b, winners, np.array([True]))
    in_best_groups = b.op("Unsqueeze", b.op("ScatterElements", none, winners, all_, axis=axis), b.ints(-1))
    choice = b.reshape_last(b.op("Where", in_best_groups, groups, b.number(float("-inf"))), 2, experts)
    _, ids = b.ops("TopK", choice, b.ints(top_k), outputs=2, axis=-1)
    weights = b.op("GatherElements", scores, ids, axis=axis)
    if norm_topk_prob:
        total = b.op("Add", b.op("ReduceSum", weights, b.ints(-1), keepdims=1), b.number(1e-20))
        weights = b.op("Div", weights, total)
    return ids, b.op("Mul", weights, b.number(routed_scaling_factor))


def moe_init_routing(b: Builder, x: ir.Value, ids: ir.Value, num_experts: int) -> tuple[ir.Value, ...]:
    """ONNX has no sort: TopK on `expert * copies + position`, all distinct, sorts by expert and is stable."""
    zero, step = b.constant(np.int64(0)), b.constant(np.int64(1))
    flat = b.op("Reshape", ids, b.ints(-1))
    copies = b.op("Size", flat)
    positions = b.op("Range", zero, copies, step)
    keys = b.op("Add", b.op("Mul", flat, copies), positions)
    _, order = b.ops("TopK", keys, b.op("Shape", flat), outputs=2, axis=0, largest=0)
    row_index = b.op("ScatterElements", order, order, positions, axis=0)
    tokens = b.op("Reshape", x, b.ints(-1, last(x)))
    rows = b.op("Gather", tokens, b.op("Div", order, b.constant(np.int64(last(ids)))), axis=0)
    nothing = b.op("ConstantOfShape", b.ints(num_experts), value=ir.tensor(np.array([0], dtype=np.int64)))
    each = _filled(b, flat, np.array([1], dtype=np.int64))
    return rows, row_index, b.op("ScatterElements", nothing, flat, each, axis=0, reduction="add")


def moe_finalize_routing(b: Builder, rows: ir.Value, row_index: ir.Value, weights: ir.Value) -> ir.Value:
    shape = b.op("Concat", b.op("Shape", weights), b.ints(last(rows)), axis=0)
    copies = b.op("Reshape", b.op("Gather", rows, row_index, axis=0), shape, allowzero=1)
    return b.op("ReduceSum", b.op("Mul", copies, b.op("Unsqueeze", weights, b.ints(-1))), b.ints(-2), keepdims=0)


def routed_expert(b: Builder, rows: ir.Value, gate_proj: ir.Value, up_proj: ir.Value, down_proj: ir.Value) -> ir.Value:
    """One expert of `fxq::moe_experts` on its rows."""
    gate, up = (b.op("MatMul", rows, b.op("Transpose", b.float(w), perm=[1, 0])) for w in (gate_proj, up_proj))
    hidden = b.op("Mul", b.silu(gate), up)
    return b.op("MatMul", hidden, b.op("Transpose", b.float(down_proj), perm=[1, 0]))


def _last_axis(value: ir.Value) -> int:
    """From the front: the reference evaluator of onnx computes ScatterElements and GatherElements wrong for axis -1."""
    assert value.shape is not None
    return len(value.shape) - 1


def _filled(b: Builder, like: ir.Value, value: np.ndarray) -> ir.Value:
    """A tensor of the shape of `like` that repeats the one element of `value`."""
    return b.op("ConstantOfShape", b.op("Shape", like), value=ir.tensor(value))


BODIES: dict[Any, Body] = {
    ops.router_logits: router_logits,
    ops.moe_gate: moe_gate,
    ops.moe_init_routing: moe_init_routing,
    ops.moe_finalize_routing: moe_finalize_routing,
}
