"""MoE routing operators: tokens to experts and back. N tokens, K chosen experts per token, E experts, H features.

Formulas: op-plugin documentation.
"""

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require
from fxquant.ops import moe_init_routing


def npu_moe_gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    norm_type: int = 0,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Router logits x [N, E] → weights [N, K] in x's dtype, expert ids int32 [N, K], best first, and float32 scores.

    Scores are sigmoids (norm_type 1). Experts are chosen by `score + bias`: the k_group groups with the largest sum of
    their two best (group_select_mode 1), in them the k best experts, the lower id among equals. Weights come from
    scores y without bias: `y / (sum(y) + eps) * routed_scaling_factor`. Scores are [N, E] with out_flag, else empty.
    """
    name = "npu_moe_gating_top_k"
    require(norm_type == 1, f"{name}: norm_type {norm_type} is not supported, only 1 (sigmoid)")
    require(group_select_mode == 1, f"{name}: group_select_mode {group_select_mode} is not supported, only 1")
    require(x.dim() == 2 and x.shape[1] % group_count == 0, f"{name}: x {tuple(x.shape)}, group_count {group_count}")
    require(1 <= k_group <= group_count, f"{name}: k_group {k_group} of group_count {group_count}")
    candidates = x.shape[1] // group_count * k_group
    require(1 <= k <= candidates, f"{name}: k is {k}, but {k_group} groups hold {candidates} experts")
    scores = x.float().sigmoid()
    choice = scores
    if bias is not None:
        require(bias.dtype == x.dtype, f"{name}: bias is {bias.dtype}, x is {x.dtype}")
        choice = scores + bias.float()
    ids = _best(_keep_groups(choice, group_count, k_group), k)
    weights = scores.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + eps) * routed_scaling_factor
    return weights.to(x.dtype), ids.int(), scores if out_flag else scores.new_empty(0)


def _keep_groups(choice: Tensor, group_count: int, k_group: int) -> Tensor:
    """`choice` with -inf outside the best groups."""
    groups = choice.unflatten(-1, (group_count, -1))
    group_scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    in_best_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter(-1, _best(group_scores, k_group), True)
    return groups.masked_fill(~in_best_groups.unsqueeze(-1), float("-inf")).flatten(-2)


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, best first, lower index first among equals; topk leaves equals in any order."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def npu_moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int = -1,
    expert_num: int = -1,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    active_expert_range: list[int] | tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Copy each token to its experts and sort the copies by expert, earlier tokens first.

    x [N, H], expert_idx int32 [N, K] → rows [N·K, H]; int32 [N·K], the row of copy `token * K + slot`; int64 rows per
    expert (expert_tokens_num_type 1); an empty scale. With active_expert_range [low, high) only these experts are used:
    their rows come first, the other rows are zeros (undefined on a device) and their copies have row -1.
    """
    name = "npu_moe_init_routing_v2"
    require(expert_idx.dtype == torch.int32, f"{name}: expert_idx is {expert_idx.dtype}, not torch.int32")
    require(x.dim() == 2 and expert_idx.dim() == 2 and len(x) == len(expert_idx), f"{name}: x and expert_idx differ")
    require(active_num in {-1, 0} or active_num >= expert_idx.numel(), f"{name}: active_num {active_num} drops rows")
    require(expert_tokens_num_type == 1, f"{name}: expert_tokens_num_type {expert_tokens_num_type} is not supported")
    require(expert_tokens_num_flag, f"{name}: expert_tokens_num_flag must be True")
    require(expert_num > 0, f"{name}: expert_num is {expert_num}")
    known = ((expert_idx >= 0) & (expert_idx < expert_num)).all()
    require(known, f"{name}: expert_idx is not within the {expert_num} experts of expert_num")
    low, high = active_expert_range or (0, expert_num)
    require(0 <= low < high <= expert_num, f"{name}: active_expert_range [{low}, {high}) of {expert_num} experts")
    # Experts below the range sort behind all others, as those above it do.
    ids = torch.where(expert_idx < low, expert_num, expert_idx) - low
    rows, row_index, counts = moe_init_routing(x, ids, expert_num - low + 1)
    active = counts[: high - low].sum()
    rows[active:] = 0
    row_index = torch.where(row_index < active, row_index, -1)
    return rows, row_index.int(), counts[: high - low].clone(), x.new_empty(0, dtype=torch.float32)


def npu_moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    """rows [N·K, H], sorted_indices [N·K] (the row of copy `token * K + slot`), probs [N, K] → [N, H].

    Each token is the sum of its rows times probs, in float32, rounded once; without probs K is 1 and rows only move.
    """
    name = "npu_moe_token_unpermute"
    weights = permuted_tokens.new_ones(len(sorted_indices), 1) if probs is None else probs
    fits = weights.dim() == 2 and weights.numel() == sorted_indices.numel()
    require(fits, f"{name}: probs {tuple(weights.shape)} for {sorted_indices.numel()} sorted_indices")
    known = ((sorted_indices >= 0) & (sorted_indices < len(permuted_tokens))).all()
    require(known, f"{name}: sorted_indices are not within {len(permuted_tokens)} permuted_tokens")
    copies = permuted_tokens[sorted_indices.long()].float().unflatten(0, tuple(weights.shape))
    return (copies * weights.float().unsqueeze(-1)).sum(-2).to(permuted_tokens.dtype)
