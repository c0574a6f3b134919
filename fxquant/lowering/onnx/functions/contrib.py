"""Function bodies of the block operators: onnxruntime's own MatMulNBits and QMoE over nibbles packed along k.

Scales of channels and groups are multiplied, and repeated where a group has several blocks, by standard operators on
initializers: onnxruntime does that once, when it loads the graph.
"""

import onnx_ir as ir

from fxquant.lowering.onnx.builder import FLOAT, Builder
from fxquant.lowering.onnx.functions.attention import last

BITS = 4


def block_linear(
    b: Builder, x: ir.Value, weight: ir.Value, weight_scale: ir.Value, weight_scale_second: ir.Value | None,
    bias: ir.Value | None, accuracy_level: int,
) -> ir.Value:  # fmt: skip
    """weight uint8 [n, blocks, block_size / 2]"""
    n, blocks, half = _sizes(weight)
    scale = block_scale(b, weight_scale, weight_scale_second, blocks)
    added = None if bias is None else b.cast(bias, FLOAT)
    sizes = {"K": blocks * 2 * half, "N": n, "block_size": 2 * half, "bits": BITS}
    return b.contrib("MatMulNBits", x, weight, scale, None, None, added, **sizes, accuracy_level=accuracy_level)


def block_experts(
    b: Builder, x: ir.Value, ids: ir.Value, weights: ir.Value, gate_up: ir.Value, gate_scale: ir.Value,
    gate_scale_second: ir.Value | None, up_scale: ir.Value, up_scale_second: ir.Value | None, down: ir.Value,
    down_scale: ir.Value, down_scale_second: ir.Value | None, block_size: int, accuracy_level: int,
) -> ir.Value:  # fmt: skip
    """gate_up uint8 [E, 2 I, H/2], rows of both alternating; down uint8 [E, H, I/2].

    The gate has chosen: its weights, with 0 for all other experts, are both what QMoE chooses by and what it weighs by.
    """
    experts, rows, half = _sizes(gate_up)
    inner = 2 * _sizes(down)[2]
    tokens, chosen = b.op("Reshape", x, b.ints(-1, 2 * half)), b.op("Reshape", ids, b.ints(-1, last(ids)))
    every = b.op("Concat", b.op("Shape", tokens, end=1), b.ints(experts), axis=0)
    nothing = b.op("Expand", b.number(0), every)
    shares = b.op("Reshape", weights, b.ints(-1, last(ids)))
    router = b.op("ScatterElements", nothing, chosen, shares, axis=1)
    halves = [
        b.op("Unsqueeze", block_scale(b, scale, second, 2 * half // block_size), b.ints(2))
        for scale, second in ((gate_scale, gate_scale_second), (up_scale, up_scale_second))
    ]
    first = b.op("Reshape", b.op("Concat", *halves, axis=2), b.ints(experts, rows, 2 * half // block_size))
    second = block_scale(b, down_scale, down_scale_second, inner // block_size)
    none = [None] * 7
    result = b.contrib(
        "QMoE", tokens, router, gate_up, first, None, down, second, *none, router, k=last(ids),
        expert_weight_bits=BITS, block_size=block_size, accuracy_level=accuracy_level, activation_type="swiglu",
        swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0, normalize_routing_weights=0,
    )  # fmt: skip
    return b.op("Reshape", result, b.op("Shape", x), allowzero=1)


def block_scale(b: Builder, scale: ir.Value, second: ir.Value | None, blocks: int) -> ir.Value:
    """float32 [..., n, blocks] of scale [..., n, 1] and second [..., n, G], where G divides blocks."""
    *rows, _ = _sizes(scale)
    if second is None:
        return b.op("Expand", scale, b.ints(*rows, blocks))
    folded, groups = b.op("Mul", scale, second), last(second)
    if groups == blocks:
        return folded
    repeated = b.op("Expand", b.op("Unsqueeze", folded, b.ints(-1)), b.ints(*rows, groups, blocks // groups))
    return b.op("Reshape", repeated, b.ints(*rows, blocks))


def _sizes(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return [int(size) for size in value.shape]  # type: ignore[arg-type]
