"""Rounding bounds: how far one float32 operator may be from another's result, computed from the actual operands.

U is half a step of float32 at 1. A sum of n products in any order is within n·U of the sum of magnitudes, and both
sides round, so most bounds have a factor 2 (Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.ops.quantized import SMALLEST_ROW_MAXIMUM
from fxquant.program.linears import PROJECTIONS
from fxquant.program.operands import item_of, operand
from fxquant.runtime.large_matrix import LargeMatrix, rows_of_a_block, side_by_side

U = 2.0**-24
SILU_SLOPE = 1.1
"""Largest derivative of silu."""

Value = Callable[[Any], Any]
Rule = Callable[[fx.Node, Value, Tensor], Tensor]
"""(call, value of an argument, expected result) → bound for each element."""


def rule_of(node: fx.Node, rules: dict[tuple[Any, int | None], Rule]) -> tuple[fx.Node, Rule | None]:
    """The call that makes the value of `node`, and its rule."""
    call, index = item_of(node)
    return call, rules.get((call.target, index))


def values_of(call: fx.Node, value: Value, *names: str) -> list[Any]:
    """The values of some operands of a call."""
    return [value(operand(call, name)) for name in names]


def _relative(steps: int) -> Rule:
    """`steps` roundings, each relative to the result."""
    return lambda call, value, expected: steps * U * expected.abs()


def _linear(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    x, weight = values_of(call, value, "x", "weight")
    return 2 * (weight.shape[1] + 2) * U * magnitudes(x, weight) + 2 * U * expected.abs()


def magnitudes(x: Tensor, weight: Tensor | LargeMatrix) -> Tensor:
    """`|x| @ |weight|.T` in float64, a block of rows of the weight [n, k] at a time."""
    return wide_products(x.double().abs(), weight, Tensor.abs)


def wide_products(
    x: Tensor, weight: Tensor | LargeMatrix, change: Callable[[Tensor], Tensor] = lambda rows: rows
) -> Tensor:
    """`x @ change(weight).T`, x float64 [..., k], a block of rows of the weight [n, k] at a time."""
    blocks_of_rows = weight.split(rows_of_a_block(weight.shape[1]))
    return side_by_side((x @ change(rows.double()).T for rows in blocks_of_rows), len(weight))


def _rms_norm(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """The mean sums n squares and the root halves its error; a bias may cancel the value, not the error."""
    return (expected.shape[-1] + 8) * U * (expected.abs() + 2 * _bias_magnitude(call, value))


def _bias_magnitude(call: fx.Node, value: Value) -> Tensor | int:
    bias = operand(call, "bias")
    return 0 if bias is None else value(bias).abs()


def _norm_scale(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """The largest magnitude of a norm's row, off by no more than the row's worst element, through one quotient."""
    x1, x2, *rest = values_of(call, value, "x1", "x2", "weight", "eps", "bias")
    y = ops.rms_norm(x1 + x2, *rest)
    return _rms_norm(call, value, y).amax(-1).reshape(expected.shape) / 127 + 2 * U * expected.abs()


def _swiglu_codes(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """1 where the float behind a code is within its own error of a tie, else 0.

    That float is y * (127 / m): swiglu has 8 roundings in y and as many in m, then quotient and product round on both
    sides.
    """
    gate, up = (tensor.double() for tensor in values_of(call, value, "gate", "up"))
    y = torch.nn.functional.silu(gate) * up
    real = y * (127 / y.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_ROW_MAXIMUM))
    return (((real - real.floor()) - 0.5).abs() <= 20 * U * real.abs()).double()


def _rope_table(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    return torch.full_like(expected, 4 * U * abs(operand(call, "scale")))


def _rope(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Two products and a sum for each rotated feature."""
    x, cos, sin = (tensor.abs().double() for tensor in values_of(call, value, "x", "cos", "sin"))
    heads, width = x.unflatten(-1, (operand(call, "num_heads"), -1)), cos.shape[-1]
    unrotated, first, second = heads[..., :-width], heads[..., -width::2], heads[..., 1 - width :: 2]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    rotated = torch.cat((first, second), -1) * cos + torch.cat((second, first), -1) * sin
    return 4 * U * torch.cat((torch.zeros_like(unrotated), rotated), -1).flatten(-2)


def _mla_attention(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Scores are off by at most d, so weights are by the factor exp(2 d) and those of rounding; then a sum of T."""
    q, kv, k_rope, mask = values_of(call, value, "q", "kv", "k_rope", "attention_mask")
    heads, v_head_dim, scale = (operand(call, name) for name in ("num_heads", "v_head_dim", "softmax_scale"))
    q, kv = (x.double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, kv))
    keys = torch.cat((kv[..., :-v_head_dim], k_rope.double().unsqueeze(1).expand(-1, heads, -1, -1)), -1)
    return _attended(q, keys, kv[..., -v_head_dim:], mask, scale)


def _attended(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """q [B, H, S, width], keys [B, H, T, width], values [B, H, T, v] → [B, S, H·v]."""
    queries, total = q.shape[2], keys.shape[2]
    visible = torch.ones(queries, total, dtype=torch.bool).tril(total - queries) & (mask[:, None, None, :] != 0)
    wide = torch.finfo(torch.float64).min
    weights = (q @ keys.transpose(-1, -2) * scale).masked_fill(~visible, wide).softmax(-1)
    magnitude = (q.abs() @ keys.abs().transpose(-1, -2) * scale).masked_fill(~visible, 0).amax(-1, keepdim=True)
    relative = torch.expm1(4 * (q.shape[-1] + 4) * U * magnitude) + (2 * total + 16) * U
    return (relative * (weights @ values.abs())).transpose(1, 2).flatten(2)


def _attend_latents(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """As `_mla_attention`; keys, values and absorbed queries are sums of their own, of what their terms add up to."""
    return _latents(call, value, *values_of(call, value, "c_kv", "k_rope"))


def _attend_halves(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """The same sums, in two parts each."""
    latents = torch.cat(values_of(call, value, "key", "value"), -1).squeeze(1)
    rank = values_of(call, value, "kv_b_weight")[0].shape[1]
    return _latents(call, value, latents[..., :rank], latents[..., rank:])


def _attend_heads(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """As `_mla_attention`."""
    q, keys, values, mask = values_of(call, value, "q", "key", "value", "attention_mask")
    q = q.double().unflatten(-1, (keys.shape[1], -1)).transpose(1, 2)
    return _attended(q, keys.double(), values.double(), mask, operand(call, "softmax_scale"))


def _latents(call: fx.Node, value: Value, c_kv: Tensor, k_rope: Tensor) -> Tensor:
    q, weight, mask = values_of(call, value, "q", "kv_b_weight", "attention_mask")
    heads, v_head_dim, scale = (operand(call, name) for name in ("num_heads", "v_head_dim", "softmax_scale"))
    q, c_kv, k_rope = q.double().unflatten(-1, (heads, -1)).transpose(1, 2), c_kv.double(), k_rope.double()
    w_uk, w_uv = weight.double().unflatten(0, (heads, -1)).tensor_split((-v_head_dim,), 1)
    queries, total, rank = q.shape[2], c_kv.shape[1], c_kv.shape[-1]
    nope = w_uk.shape[1]
    visible = torch.ones(queries, total, dtype=torch.bool).tril(total - queries) & (mask[:, None, None, :] != 0)

    def scores(q: Tensor, w_uk: Tensor, c_kv: Tensor, k_rope: Tensor) -> Tensor:
        keys = (c_kv.unsqueeze(1) @ w_uk.transpose(-1, -2), k_rope.unsqueeze(1).expand(-1, heads, -1, -1))
        return q @ torch.cat(keys, -1).transpose(-1, -2) * scale

    weights = scores(q, w_uk, c_kv, k_rope).masked_fill(~visible, torch.finfo(torch.float64).min).softmax(-1)
    reach = scores(q.abs(), w_uk.abs(), c_kv.abs(), k_rope.abs()).masked_fill(~visible, 0).amax(-1, keepdim=True)
    relative = torch.expm1(4 * (q.shape[-1] + rank + 6) * U * reach) + 2 * (total + rank + nope + 10) * U
    values = c_kv.abs().unsqueeze(1) @ w_uv.abs().transpose(-1, -2)
    return (relative * (weights @ values)).transpose(1, 2).flatten(2)


def _dequantize_per_token(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Two products and a sum on top of exact integers; a bias may cancel the value, not the error."""
    return 8 * U * (expected.abs() + 2 * _bias_magnitude(call, value))


def _moe_gate(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """A sigmoid, a sum of top_k, a quotient and a product."""
    return (2 * int(operand(call, "top_k")) + 16) * U * expected.abs()


def _moe_finalize_routing(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    rows, row_index, weights = values_of(call, value, "rows", "row_index", "weights")
    magnitude = ops.moe_finalize_routing(rows.abs(), row_index, weights.abs())
    return 2 * (weights.shape[-1] + 2) * U * magnitude


def _moe_experts(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Errors of gate and up go through silu and the product into the sum of down."""
    x, ids, weights = values_of(call, value, "x", "ids", "weights")
    gate_proj, up_proj, down_proj = values_of(call, value, *PROJECTIONS)
    rows, row_index, counts = ops.moe_init_routing(x, ids, len(gate_proj))
    errors = torch.zeros(len(rows), x.shape[-1], dtype=torch.float64)
    outputs = torch.zeros_like(errors)
    for expert, block in blocks(counts):
        expert_rows = rows[block].double()
        (gate, gate_error), (up, up_error) = (_product(expert_rows, w[expert].double()) for w in (gate_proj, up_proj))
        activated = torch.nn.functional.silu(gate)
        hidden = activated * up
        hidden_error = SILU_SLOPE * gate_error * up.abs() + activated.abs() * up_error + 16 * U * hidden.abs()
        outputs[block], own = _product(hidden, down_proj[expert].double())
        errors[block] = own + hidden_error @ down_proj[expert].double().abs().T
    wide = weights.abs().double()
    steps = 2 * (weights.shape[-1] + 2) * U
    return ops.moe_finalize_routing(errors + steps * outputs.abs(), row_index, wide)


def _product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return x @ weight.T, 2 * (weight.shape[1] + 2) * U * (x.abs() @ weight.abs().T)


def blocks(counts: Tensor) -> Iterator[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any."""
    start = 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            yield expert, slice(start, start + count)
        start += count


RULES: dict[tuple[Any, int | None], Rule] = {
    (ops.linear, None): _linear,
    (ops.router_logits, None): _linear,
    (ops.rms_norm, None): _rms_norm,
    (ops.add_rms_norm, 0): _rms_norm,
    (ops.add_rms_norm_quantize_per_token, 1): _norm_scale,
    (ops.swiglu, None): _relative(8),
    (ops.swiglu_quantize_per_token, 0): _swiglu_codes,
    (ops.swiglu_quantize_per_token, 1): _relative(10),
    (ops.rope_table, 0): _rope_table,
    (ops.rope_table, 1): _rope_table,
    (ops.rope, None): _rope,
    (ops.mla_attention, None): _mla_attention,
    (ops.attend_latents, None): _attend_latents,
    (ops.attend_halves, None): _attend_halves,
    (ops.attend_heads, None): _attend_heads,
    (ops.expand_heads, 0): _relative(0),
    (ops.expand_heads, 1): _relative(0),
    (ops.quantize_per_token, 1): _relative(2),
    (ops.dequantize_static, None): _relative(4),
    (ops.dequantize_per_token, None): _dequantize_per_token,
    (ops.grouped_dequantize, None): _relative(8),
    (ops.moe_gate, 1): _moe_gate,
    (ops.moe_finalize_routing, None): _moe_finalize_routing,
    (ops.moe_experts, None): _moe_experts,
}
