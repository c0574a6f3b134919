"""Bounds for the Ascend module: how far a float32 statement may be from the graph's value.

The rules of `fxquant.verification.bounds`, and the engine's own arithmetic for int4. No rule means that both sides do
the same arithmetic: the bound is 0, as for the integers of a fused norm and for its sum. Swiglu reads its halves from
one tensor here, so its last bit may differ, and with it a code.
"""

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.ops.quantized import expand_int4
from fxquant.program.operands import operand
from fxquant.runtime.large_matrix import rows_of_a_block, side_by_side
from fxquant.verification.bounds import RULES, U, Value, blocks, rule_of, values_of

U_FLOAT16 = 2.0**-11
U_BFLOAT16 = 2.0**-8
SMALLEST_HALF_STEP = 2.0**-25
"""Half a step of float16 below its normal numbers."""


def error_bound(node: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Bound for the value of `node`, of the shape of `expected`."""
    call, rule = rule_of(node, RULES)
    if rule is None:
        return torch.zeros_like(expected)
    bound = rule(call, value, expected).reshape(expected.shape)
    return bound + _engine_int4(call, value, expected)


def _engine_int4(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """What the engine's int4 product adds to the rounding of its dequantization; 0 for other calls."""
    added = torch.zeros_like(expected, dtype=torch.float64)
    product = operand(call, "acc") if call.target in (ops.dequantize_per_token, ops.grouped_dequantize) else call
    if product.target not in (ops.int4_matmul, ops.grouped_int4_matmul):
        return added
    x8, weight, second = values_of(product, value, "x", "weight", "weight_scale_second")
    scale, x_scale = values_of(call, value, "weight_scale", "x_scale")
    if product.target == ops.int4_matmul:
        return _int4(x8, weight, second, scale, x_scale)
    for expert, rows in blocks(value(operand(product, "counts"))):
        group_scale = None if second is None else second[expert]
        added[rows] = _int4(x8[rows], weight[expert], group_scale, scale[expert], x_scale[rows])
    return added


def _int4(x8: Tensor, packed: Tensor, second: Tensor | None, scale: Tensor, x_scale: Tensor) -> Tensor:
    """The engine computes `(Σ_g s_g Σ_k (x - 8) q + bias) * x_scale`, the graph `Σ_g s_g Σ_k x q * x_scale`.

    With a second scale, s_g is rounded to float16 and the scale in bias to bfloat16; the rest is float32, where x - 8
    comes in two nibbles, `16 hi + lo`. packed int8 [n/2, k], scale [n, 1], second [n, G], x_scale [..., 1].
    """
    count = rows_of_a_block(packed.shape[1])
    seconds = [None] * len(packed) if second is None else second.split(count)
    rows = zip(packed.split(count // 2), scale.split(count), seconds, strict=False)
    return side_by_side((_int4_rows(x8, *block) for block in rows), len(scale)) * x_scale.double()


def _int4_rows(x8: Tensor, packed: Tensor, scale: Tensor, second: Tensor | None) -> Tensor:
    """`_int4` of some rows, before the scale of x."""
    q = expand_int4(packed, None).double().unflatten(1, (1 if second is None else second.shape[1], -1))
    s = scale.double() * (1 if second is None else second.double())
    x = x8.double().unflatten(-1, q.shape[1:])
    high, shifted = (x / 16).floor(), x - 8
    low = shifted - 16 * high
    parts = [torch.einsum("...gk,ngk->...ng", part, q).abs() for part in (shifted, high, low)]
    codes = 8 * q.sum(-1)
    bound = (q.shape[1] + 24) * U * ((s * (16 * parts[1] + parts[2])).sum(-1) + (8 * q.abs().sum(-1) * s).sum(-1))
    if second is not None:
        bound += ((U_FLOAT16 * s).clamp(min=SMALLEST_HALF_STEP) * parts[0]).sum(-1)
        bound += U_BFLOAT16 * (codes * s).sum(-1).abs()
    return bound
