"""Bounds for block operators: how far int4 products of onnxruntime may be from their references, and from int8 by row.

With accuracy level 0 a product is a sum of floats. With level 4 MLAS rounds each block of `block_size` values of a row
to `rne(x * (127 / m))`, m the block's largest magnitude (QuantizeARow_CompInt8 of its AVX2 and AVX512 kernels), so a
value moves by at most m / 254, and a product with weights w by the sum of m / 254 * |w|. Its kernels for ARM round by
the row, as the rewritten graph does: the distance from that is at most the sum of both.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import silu

from fxquant import ops
from fxquant.ops.blocks import block_weight
from fxquant.program.operands import operand
from fxquant.verification.bounds import SILU_SLOPE, U, Value, values_of

BY_BLOCK = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")
TIES = 1 + 2.0**-12
"""A code is the nearest but for the rounding of `x * (127 / m)`, at most 2 * 127 roundings of a step."""
SWIGLU_STEPS = 64
"""Roundings of a swiglu, its exponential's error among them, each relative to the value."""
DROPPED = 1e-8
"""QMoE leaves out experts of no larger weight."""
PROJECTIONS = ("gate", "up", "down")


def level_width(call: fx.Node, features: int) -> int:
    """How many values of a row of `features` onnxruntime rounds by one scale; 0: it rounds none."""
    if not operand(call, "accuracy_level"):
        return 0
    return int(operand(call, "block_size")) if BY_BLOCK else features


def block_linear_bound(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Between `block_linear` and onnxruntime."""
    return _linear_error(call, value, level_width(call, value(operand(call, "x")).shape[-1]))


def block_experts_bound(call: fx.Node, value: Value, expected: Tensor) -> Tensor:
    """Between `block_experts` and onnxruntime."""
    return _experts_error(call, value, bool(operand(call, "accuracy_level")))


def distance_bound(call: fx.Node, value: Value, bound: Tensor) -> Tensor:
    """Between onnxruntime, which is within `bound` of the reference, and the rewritten graph."""
    if call.target == ops.block_linear:
        return bound + _linear_error(call, value, value(operand(call, "x")).shape[-1])
    return bound + _experts_error(call, value, True, whole_rows=True)


def rewritten_value(call: fx.Node, value: Value) -> Tensor:
    """What the rewritten graph computes in place of a block operator, from the same inputs: int8 per token."""
    if call.target == ops.block_linear:
        names = ("x", "weight", "weight_scale", "weight_scale_second", "bias")
        x, weight, scale, second, bias = values_of(call, value, *names)
        return _per_token(x, weight, scale, second, bias)
    result = torch.zeros_like(value(operand(call, "x")).flatten(0, -2))
    for own in _expert_rows(call, value):
        gate, up = (_per_token(own.x, *own.tensors[name]) for name in ("gate", "up"))
        down = _per_token(ops.swiglu(gate, up), *own.tensors["down"])
        result.index_add_(0, own.rows, down * own.shares.unsqueeze(-1))
    return result.view(value(operand(call, "x")).shape)


def _per_token(x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, bias: Tensor | None = None) -> Tensor:
    codes, x_scale = ops.quantize_per_token(x)
    return ops.per_token_int4_linear(codes, x_scale, weight, scale, second, bias)


@dataclass(frozen=True)
class _ExpertRows:
    """The tokens of one expert: their indices, values and weights, and the expert's tensors by projection."""

    rows: Tensor
    x: Tensor
    shares: Tensor
    tensors: dict[str, tuple[Tensor, Tensor, Tensor | None]]


def _expert_rows(call: fx.Node, value: Value) -> Iterator[_ExpertRows]:
    x, ids, weights = (tensor.flatten(0, -2) for tensor in values_of(call, value, "x", "ids", "weights"))
    stacks = {name: values_of(call, value, name, f"{name}_scale", f"{name}_scale_second") for name in PROJECTIONS}
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        tensors = {
            name: (weight[expert], scale[expert], None if second is None else second[expert])
            for name, (weight, scale, second) in stacks.items()
        }
        yield _ExpertRows(rows, x[rows], weights[rows, slots], tensors)


def _linear_error(call: fx.Node, value: Value, width: int) -> Tensor:
    names = ("x", "weight", "weight_scale", "weight_scale_second", "bias")
    x, weight, scale, second, bias = values_of(call, value, *names)
    error = _product_error(x.double(), block_weight(weight, scale, second).double().abs(), width)
    return error if bias is None else error + 4 * U * bias.double().abs()


def _experts_error(call: fx.Node, value: Value, rounded: bool, whole_rows: bool = False) -> Tensor:
    """Errors of gate and up move the swiglu, its rounding and theirs move down's products, which are then weighed."""
    size = int(operand(call, "block_size")) if BY_BLOCK and not whole_rows else 0
    x = value(operand(call, "x"))
    result = torch.zeros(x.flatten(0, -2).shape, dtype=torch.float64)
    for own in _expert_rows(call, value):
        gate, up, down = (block_weight(*own.tensors[name]).double() for name in PROJECTIONS)
        tokens = own.x.double()
        width = (size or tokens.shape[-1]) if rounded else 0
        g, u = tokens @ gate.T, tokens @ up.T
        g_error, u_error = _product_error(tokens, gate.abs(), width), _product_error(tokens, up.abs(), width)
        hidden = silu(g) * u
        moved = SILU_SLOPE * g_error * (u.abs() + u_error) + silu(g).abs() * u_error + SWIGLU_STEPS * U * hidden.abs()
        error = moved @ down.abs().T
        error += _product_error(hidden.abs() + moved, down.abs(), (size or hidden.shape[-1]) if rounded else 0)
        sums = 2 * (value(operand(call, "ids")).shape[-1] + 2) * U + DROPPED  # weighed and added up, or left out
        error += sums * (hidden.abs() @ down.abs().T)
        result.index_add_(0, own.rows, error * own.shares.double().abs().unsqueeze(-1))
    return result.view(x.shape)


def _product_error(x: Tensor, magnitudes: Tensor, width: int) -> Tensor:
    """Of `x @ w.T`, w of these magnitudes: sums of k floats in any order, and values rounded by `width` (0: not)."""
    features = x.shape[-1]
    error = 2 * (features + 8) * U * (x.abs() @ magnitudes.T)
    if not width:
        return error
    half = x.abs().unflatten(-1, (-1, width)).amax(-1) / 254 * TIES
    return error + half.repeat_interleave(width, -1) @ magnitudes.T
