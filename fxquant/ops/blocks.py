"""Block operators: int4 weights as onnxruntime's MatMulNBits and QMoE multiply them, by activations that stay float.

Passes create them in deployment graphs. Shapes: K of E experts per token, H hidden, I intermediate, k and n in and out
features, G groups. A weight is `q4 * scale`, the product of channel and group scale rounded to float32
once. `block_size` is how many k the kernels take with one scale, and changes no value. `accuracy_level` 0 is what the
references compute; with 4 the kernels round each block of x to int8, and results are that far from the references.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import silu

from fxquant.ops.library import define, expect
from fxquant.ops.quantized import expand_int4


def block_weight(weight: Tensor, weight_scale: Tensor, weight_scale_second: Tensor | None) -> Tensor:
    """Packed int4 [n/2, k], scales [n, 1] and integers [n, G] or None → float32 [n, k]."""
    codes = expand_int4(weight, None).float()
    if weight_scale_second is None:
        return codes * weight_scale
    scale = weight_scale * weight_scale_second
    return codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)


def _block_linear_shape(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_scale_second: Tensor | None, bias: Tensor | None,
    block_size: int, accuracy_level: int,
) -> Tensor:  # fmt: skip
    k = weight.shape[1]
    expect(x.shape[-1] == k, f"fxq::block_linear: x has {x.shape[-1]} features, the weight {k}")
    expect(k % block_size == 0, f"fxq::block_linear: {k} features in blocks of {block_size}")
    return x.new_empty((*x.shape[:-1], 2 * weight.shape[0]), dtype=torch.float32)


@define(
    "block_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? weight_scale_second, Tensor? bias, "
    "int block_size, int accuracy_level) -> Tensor",
    _block_linear_shape,
)
def block_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, weight_scale_second: Tensor | None, bias: Tensor | None,
    block_size: int, accuracy_level: int,
) -> Tensor:  # fmt: skip
    """float x [..., k], packed int4 weight [n/2, k] → float32 [..., n] = `x @ block_weight.T + bias`."""
    return torch.nn.functional.linear(x.float(), block_weight(weight, weight_scale, weight_scale_second), bias)


def _block_experts_shape(
    x: Tensor, ids: Tensor, weights: Tensor,
    gate: Tensor, gate_scale: Tensor, gate_scale_second: Tensor | None,
    up: Tensor, up_scale: Tensor, up_scale_second: Tensor | None,
    down: Tensor, down_scale: Tensor, down_scale_second: Tensor | None,
    block_size: int, accuracy_level: int,
) -> Tensor:  # fmt: skip
    expect(gate.shape == up.shape, "fxq::block_experts: gate and up differ in shape")
    expect(x.shape[-1] == gate.shape[2], f"fxq::block_experts: x has {x.shape[-1]} features, not {gate.shape[2]}")
    expect(down.shape[2] == 2 * gate.shape[1], "fxq::block_experts: down and gate differ in width")
    return x.new_empty(x.shape, dtype=torch.float32)


@define(
    "block_experts(Tensor x, Tensor ids, Tensor weights, "
    "Tensor gate, Tensor gate_scale, Tensor? gate_scale_second, Tensor up, Tensor up_scale, Tensor? up_scale_second, "
    "Tensor down, Tensor down_scale, Tensor? down_scale_second, int block_size, int accuracy_level) -> Tensor",
    _block_experts_shape,
)
def block_experts(
    x: Tensor, ids: Tensor, weights: Tensor,
    gate: Sequence[Tensor], gate_scale: Sequence[Tensor], gate_scale_second: Sequence[Tensor] | None,
    up: Sequence[Tensor], up_scale: Sequence[Tensor], up_scale_second: Sequence[Tensor] | None,
    down: Sequence[Tensor], down_scale: Sequence[Tensor], down_scale_second: Sequence[Tensor] | None,
    block_size: int, accuracy_level: int,
) -> Tensor:  # fmt: skip
    """Weighted sum of `down(silu(gate x) * up x)` over the experts of each token, in float32.

    x [..., H]; ids int64, weights float32 [..., K], positive; gate, up [E, I/2, H] and down [E, H/2, I] packed int4;
    scales [E, n, 1], second scales [E, n, G].
    """
    tokens, chosen, shares = x.flatten(0, -2).float(), ids.flatten(0, -2), weights.flatten(0, -2)
    result = torch.zeros_like(tokens)
    for expert in chosen.unique().tolist():
        rows, slots = (chosen == expert).nonzero(as_tuple=True)
        own = [
            block_weight(q[expert], s[expert], None if second is None else second[expert])
            for q, s, second in (
                (gate, gate_scale, gate_scale_second),
                (up, up_scale, up_scale_second),
                (down, down_scale, down_scale_second),
            )
        ]
        hidden = silu(tokens[rows] @ own[0].T) * (tokens[rows] @ own[1].T)
        result.index_add_(0, rows, (hidden @ own[2].T) * shares[rows, slots].unsqueeze(-1))
    return result.view(x.shape)
