"""MoE routing (DeepSeek-V3, arXiv:2412.19437, section 2.1.2) and routed experts.

Shapes: N tokens (all leading dimensions flattened), K experts per token, E experts, H hidden, I intermediate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.ops.library import define, expect


def _router_logits_shape(x: Tensor, weight: Tensor) -> Tensor:
    expect(x.shape[-1] == weight.shape[1], f"fxq::router_logits: x has {x.shape[-1]} features, not {weight.shape[1]}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@define("router_logits(Tensor x, Tensor weight) -> Tensor", _router_logits_shape)
def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float32: x [..., H], weight [E, H] → float32 [..., E]. Never quantized."""
    return torch.nn.functional.linear(x.float(), weight.float())


def _moe_gate_shape(
    logits: Tensor, correction_bias: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    expect(logits.dtype == torch.float32, f"fxq::moe_gate: logits must be float32, not {logits.dtype}")
    expect(logits.shape[-1] % n_group == 0, f"fxq::moe_gate: {logits.shape[-1]} experts, {n_group} groups")
    shape = (*logits.shape[:-1], top_k)
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@define(
    "moe_gate(Tensor logits, Tensor correction_bias, int top_k, int n_group, int topk_group, bool norm_topk_prob, "
    "float routed_scaling_factor) -> (Tensor, Tensor)",
    _moe_gate_shape,
)
def moe_gate(
    logits: Tensor, correction_bias: Tensor, top_k: int, n_group: int, topk_group: int, norm_topk_prob: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """logits float32 [..., E] → expert ids int64 [..., K], weights float32 [..., K], best expert first.

    Scores are sigmoids. The bias affects the choice, not the weights: a group's score is the sum of its two best biased
    scores, experts outside the `topk_group` best groups are excluded, the `top_k` best biased scores win, and their
    unbiased scores are the weights: divided by their sum + 1e-20 if `norm_topk_prob`, then times
    `routed_scaling_factor`. Ties go to the lower index.
    """
    scores = logits.sigmoid()
    groups = (scores + correction_bias.float()).unflatten(-1, (n_group, -1))
    group_scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    in_best_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, _best(group_scores, topk_group), True)
    choice = groups.masked_fill(~in_best_groups.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = _best(choice, top_k)
    weights = scores.gather(-1, ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * routed_scaling_factor


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values; torch.topk gives no order for equal ones."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()


def _moe_experts_shape(
    x: Tensor, ids: Tensor, weights: Tensor, gate_proj: Tensor, up_proj: Tensor, down_proj: Tensor
) -> Tensor:
    expect(gate_proj.shape == up_proj.shape, "fxq::moe_experts: gate_proj and up_proj differ in shape")
    expect(
        x.shape[-1] == gate_proj.shape[2], f"fxq::moe_experts: x has {x.shape[-1]} features, not {gate_proj.shape[2]}"
    )
    expect(down_proj.shape[2] == gate_proj.shape[1], "fxq::moe_experts: down_proj and gate_proj differ in width")
    return x.new_empty(x.shape)


@define(
    "moe_experts(Tensor x, Tensor ids, Tensor weights, Tensor gate_proj, Tensor up_proj, Tensor down_proj) -> Tensor",
    _moe_experts_shape,
)
def moe_experts(
    x: Tensor, ids: Tensor, weights: Tensor, gate_proj: Sequence[Tensor], up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    """Weighted sum of `down(silu(gate x) * up x)` over the experts of each token.

    x [..., H]; ids int64, weights float32 [..., K]; gate_proj, up_proj [E, I, H], down_proj [E, H, I].
    """
    rows, row_index, counts = _sort_by_expert(x, ids, len(gate_proj))
    for expert, block in enumerate(rows.split(counts.tolist())):
        if len(block):
            hidden = torch.nn.functional.silu(block @ gate_proj[expert].T) * (block @ up_proj[expert].T)
            block.copy_(hidden @ down_proj[expert].T)  # in place: rows are our copies, already K times x
    return _weighted_sum(rows, row_index, weights, x)


def _moe_init_routing_shape(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty((ids.numel(), x.shape[-1])),
        ids.new_empty((ids.numel(),), dtype=torch.int64),
        ids.new_empty((num_experts,), dtype=torch.int64),
    )


@define("moe_init_routing(Tensor x, Tensor ids, int num_experts) -> (Tensor, Tensor, Tensor)", _moe_init_routing_shape)
def moe_init_routing(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copy each token once per expert and sort the copies by expert, earlier tokens first.

    x [..., H], ids int64 [..., K] → rows [N·K, H]; row_index int64 [N·K], the row of copy `token * K + slot`;
    counts int64 [E], rows per expert.
    """
    return _sort_by_expert(x, ids, num_experts)


def _moe_finalize_routing_shape(rows: Tensor, row_index: Tensor, weights: Tensor) -> Tensor:
    return rows.new_empty((*weights.shape[:-1], rows.shape[-1]))


@define("moe_finalize_routing(Tensor rows, Tensor row_index, Tensor weights) -> Tensor", _moe_finalize_routing_shape)
def moe_finalize_routing(rows: Tensor, row_index: Tensor, weights: Tensor) -> Tensor:
    """Undo `moe_init_routing` and sum the rows of each token, weighted: rows [N·K, H], weights [..., K] → [..., H]."""
    return _weighted_sum(rows, row_index, weights, rows)


def _sort_by_expert(x: Tensor, ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    row_index = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rows = x.flatten(0, -2)[order // ids.shape[-1]]
    return rows, row_index, torch.bincount(flat, minlength=num_experts)


def _weighted_sum(rows: Tensor, row_index: Tensor, weights: Tensor, like: Tensor) -> Tensor:
    copies = rows[row_index].unflatten(0, tuple(weights.shape))
    return copies.mul_(weights.to(rows.dtype).unsqueeze(-1)).sum(-2).to(like.dtype)
