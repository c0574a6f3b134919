"""Composites: short sequences around one engine operator, which adapt its shapes to those of the graph.

The emitter copies the source of these functions into the module that it writes. B batch, S new positions, T keys.
"""

import torch
from torch import Tensor


def find_hidden_keys(attention_mask: Tensor, queries: int) -> Tensor:
    """bool [B, 1, S, T], True where a query must not see a key: a later one, or padding (0 in attention_mask [B, T]).

    The `queries` = S queries are the last of the T positions.
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    later = positions > positions[-queries:, None]
    return (later | (attention_mask[:, None, :] == 0)).unsqueeze(1)


def rope_table(position_ids: Tensor, inv_freq: list[float], scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """position_ids [B, S] -> cos, sin [B, S, 2 * len(inv_freq)], computed in float32; both halves are equal."""
    angle = position_ids[..., None].float() * torch.tensor(inv_freq, dtype=torch.float32, device=position_ids.device)
    angle = torch.cat((angle, angle), -1)
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the last features of each head, as many as cos has: x [B, S, num_heads * width]."""
    heads = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    width = cos.shape[-1]
    unrotated, rotated = heads[..., :-width], heads[..., -width:].contiguous()
    rotated = torch.ops.npu.npu_interleave_rope(rotated, cos.unsqueeze(1), sin.unsqueeze(1))
    return torch.cat((unrotated, rotated), -1).transpose(1, 2).flatten(2)


def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, hidden_keys: Tensor, num_heads: int, v_head_dim: int, softmax_scale: float
) -> Tensor:
    """q [B, S, heads * (nope + rope)], kv [B, T, heads * (nope + v_head_dim)], k_rope [B, T, rope] for all heads."""
    q, kv = q.unflatten(-1, (num_heads, -1)), kv.unflatten(-1, (num_heads, -1))
    width = k_rope.shape[-1]
    context, _ = torch.ops.npu.npu_fused_infer_attention_score(
        q[..., :-width].contiguous(),
        kv[..., :-v_head_dim].contiguous(),
        kv[..., -v_head_dim:].contiguous(),
        atten_mask=hidden_keys,
        query_rope=q[..., -width:].contiguous(),
        key_rope=k_rope.unsqueeze(2).expand(-1, -1, num_heads, -1).contiguous(),
        num_heads=num_heads,
        num_key_value_heads=num_heads,
        scale=softmax_scale,
        input_layout="BSND",
    )
    return context.flatten(2)


def gather_latents(pages: tuple[Tensor, Tensor], block_table: Tensor) -> Tensor:
    """All pages of each sequence, block_table int32 [B, blocks] -> latents [B, blocks * block_size, width].

    pages: the two parts of a layer's latents, [num_blocks, block_size, 1, width of the part].
    """
    parts = [page.index_select(0, block_table.flatten()) for page in pages]
    return torch.cat([part.unflatten(0, block_table.shape).flatten(1, 3) for part in parts], -1)


def write_latents(pages: tuple[Tensor, Tensor], latents: Tensor, slot_mapping: Tensor) -> tuple[Tensor, Tensor]:
    """Write the last S positions of latents [B, T, width] into the pages at slot_mapping int32 [B, S], in place."""
    steps = slot_mapping.shape[1]
    new = latents.narrow(1, latents.shape[1] - steps, steps).flatten(0, 1).unsqueeze(1)
    rank = pages[0].shape[-1]
    torch.ops.npu.npu_scatter_pa_kv_cache(
        new[..., :rank].contiguous(),
        new[..., rank:].contiguous(),
        pages[0],
        pages[1],
        slot_mapping.flatten(),
        cache_mode="Norm",
    )
    return pages


def latent_attention(
    q: Tensor,
    kv_b_weight: Tensor,
    pages: tuple[Tensor, Tensor],
    block_table: Tensor,
    seq_lens: list[int],
    num_heads: int,
    v_head_dim: int,
    softmax_scale: float,
) -> Tensor:
    """One query per sequence over its pages: q [B, 1, heads * (nope + rope)], seq_lens: positions, new ones included.

    kv_b_weight [heads * (nope + v_head_dim), rank]: its first part projects queries to the latents' space, its second
    part the context to values. -> [B, 1, heads * v_head_dim].
    """
    q, weight = q.squeeze(1).unflatten(-1, (num_heads, -1)), kv_b_weight.unflatten(0, (num_heads, -1))
    (c_kv, k_rope), width = (page.transpose(1, 2) for page in pages), pages[1].shape[-1]
    latent_q = torch.bmm(q[..., :-width].transpose(0, 1), weight[:, :-v_head_dim]).transpose(0, 1)
    context, _ = torch.ops.npu.npu_fused_infer_attention_score(
        latent_q.unsqueeze(2).contiguous(),
        c_kv,
        c_kv,
        query_rope=q[..., -width:].unsqueeze(2).contiguous(),
        key_rope=k_rope,
        num_heads=num_heads,
        num_key_value_heads=1,
        scale=softmax_scale,
        input_layout="BNSD",
        block_table=block_table,
        block_size=pages[0].shape[1],
        actual_seq_lengths_kv=seq_lens,
    )
    values = torch.bmm(context.squeeze(2).transpose(0, 1), weight[:, -v_head_dim:].transpose(1, 2))
    return values.transpose(0, 1).flatten(1).unsqueeze(1)


def moe_gate(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """Router logits float32 [..., experts] -> [..., top_k]: expert ids int32, their normalized weights float32."""
    weights, ids, _ = torch.ops.npu.npu_moe_gating_top_k(
        logits.flatten(0, -2),
        top_k,
        bias=bias,
        k_group=topk_group,
        group_count=n_group,
        group_select_mode=1,
        renorm=0,
        norm_type=1,
        routed_scaling_factor=routed_scaling_factor,
        eps=1e-20,
    )
    return ids.unflatten(0, logits.shape[:-1]), weights.unflatten(0, logits.shape[:-1])


def moe_gate_unnormalized(
    logits: Tensor, bias: Tensor, top_k: int, n_group: int, topk_group: int, routed_scaling_factor: float
) -> tuple[Tensor, Tensor]:
    """`moe_gate` without dividing the weights by their sum, a step that npu_moe_gating_top_k cannot skip."""
    scores = logits.sigmoid()
    groups = (scores + bias).unflatten(-1, (n_group, -1))
    group_scores = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
    in_best_groups = torch.zeros_like(group_scores, dtype=torch.bool).scatter(
        -1, largest(group_scores, topk_group), True
    )
    ids = largest(groups.masked_fill(~in_best_groups.unsqueeze(-1), float("-inf")).flatten(-2), top_k)
    return ids.int(), scores.gather(-1, ids) * routed_scaling_factor


def largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest values, the lower index first among equal values."""
    return values.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def int4_linear(
    x8: Tensor, x_scale: Tensor, weight: Tensor, scale: Tensor, scale_bias: Tensor, dtype: torch.dtype
) -> Tensor:
    """A linear with int4 weights as a grouped matmul of one expert: x8 [..., k], x_scale [...] -> [..., n]."""
    rows = x8.flatten(0, -2)
    counts = torch.full((1,), rows.shape[0], dtype=torch.int64, device=rows.device)
    (y,) = torch.ops.npu.npu_grouped_matmul(
        [rows],
        [weight],
        bias=[scale_bias],
        scale=[scale],
        per_token_scale=[x_scale.flatten()],
        group_list=counts,
        split_item=2,
        group_type=0,
        group_list_type=1,
        output_dtype=dtype,
    )
    return y.unflatten(0, x8.shape[:-1])
