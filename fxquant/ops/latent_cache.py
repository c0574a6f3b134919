"""Paged latent cache of several sequences, and attention that reads from it (DeepSeek-V2, arXiv:2405.04434).

Shapes: B sequences, S new positions, H heads; a cache is [num_blocks, block_size, width]; block_table int32
[B, blocks] lists the pages of each sequence in order; slot_mapping int32 [B, S] gives the slot of each new position:
slot s is row `s % block_size` of page `s // block_size`, -1 is not stored. A contiguous cache has its pages in order.
"""

import torch
from torch import Tensor

from fxquant.ops.library import define, expect


def _write_latents_shape(cache: Tensor, latents: Tensor, slot_mapping: Tensor) -> Tensor:
    expect(cache.dim() == 3, "fxq::write_latents: cache is not [num_blocks, block_size, width]")
    expect(cache.shape[2] == latents.shape[2], f"fxq::write_latents: latents of {latents.shape[2]}, not of the cache")
    expect(slot_mapping.dim() == 2, "fxq::write_latents: slot_mapping is not [B, S]")
    return cache.new_empty(cache.shape)


@define("write_latents(Tensor cache, Tensor latents, Tensor slot_mapping) -> Tensor", _write_latents_shape)
def write_latents(cache: Tensor, latents: Tensor, slot_mapping: Tensor) -> Tensor:
    """The cache with the last S positions of latents [B, T >= S, width] written to their slots."""
    written = cache.clone()
    new = latents[:, latents.shape[1] - slot_mapping.shape[1] :]
    valid = slot_mapping >= 0
    written.flatten(0, 1)[slot_mapping[valid].long()] = new[valid]
    return written


def _gather_latents_shape(cache: Tensor, block_table: Tensor) -> Tensor:
    expect(cache.dim() == 3 and block_table.dim() == 2, "fxq::gather_latents: wrong rank of cache or block_table")
    return cache.new_empty((block_table.shape[0], block_table.shape[1] * cache.shape[1], cache.shape[2]))


@define("gather_latents(Tensor cache, Tensor block_table) -> Tensor", _gather_latents_shape)
def gather_latents(cache: Tensor, block_table: Tensor) -> Tensor:
    """All pages of each sequence, concatenated: [B, blocks · block_size, width]."""
    return cache[block_table.long()].flatten(1, 2)


def _latent_attention_shape(
    q: Tensor, kv_b_weight: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    nope = kv_b_weight.shape[0] // num_heads - v_head_dim
    rope = cache.shape[2] - kv_b_weight.shape[1]
    expect(
        q.shape[-1] == num_heads * (nope + rope),
        f"fxq::latent_attention: queries of {q.shape[-1]} are not {num_heads} heads of {nope} and {rope}",
    )
    expect(
        block_table.dim() == 2 and seq_lens.dim() == 1, "fxq::latent_attention: wrong rank of block_table or seq_lens"
    )
    return q.new_empty((*q.shape[:-1], num_heads * v_head_dim))


@define(
    "latent_attention(Tensor q, Tensor kv_b_weight, Tensor cache, Tensor block_table, Tensor seq_lens, "
    "int num_heads, int v_head_dim, float softmax_scale) -> Tensor",
    _latent_attention_shape,
)
def latent_attention(
    q: Tensor, kv_b_weight: Tensor, cache: Tensor, block_table: Tensor, seq_lens: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """`fxq::mla_attention` over cached latents, with the weight of kv_b_proj absorbed into the queries.

    q [B, S, H·(nope + rope)]; kv_b_weight [H·(nope + v_head_dim), kv_lora_rank], per head W_UK and W_UV; the cache
    holds c_kv [kv_lora_rank] and k_rope of each position; seq_lens int32 [B] counts the positions of each sequence,
    including the S new ones at its end. With c a latent:
    `q · (W_UK c) = (q W_UK) · c` and `Σ p W_UV c = W_UV Σ p c`, so keys and values are never materialized.
    Query i sees position j when j < seq_len - S + i + 1; a query that sees none gives zeros. → [B, S, H·v_head_dim].
    """
    rank, queries = kv_b_weight.shape[1], q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    w_uk, w_uv = kv_b_weight.unflatten(0, (num_heads, -1)).tensor_split((-v_head_dim,), 1)
    latents = gather_latents(cache, block_table).unsqueeze(1)
    c_kv, k_rope = latents[..., :rank], latents[..., rank:]
    width = k_rope.shape[-1]
    scores = queries[..., :-width] @ w_uk @ c_kv.transpose(-1, -2)
    scores = scores + queries[..., -width:] @ k_rope.transpose(-1, -2)
    hidden = ~_visible(seq_lens, q.shape[1], latents.shape[2]).unsqueeze(1)
    scores = (scores * softmax_scale).float().masked_fill(hidden, torch.finfo(torch.float32).min)
    weights = scores.softmax(-1).masked_fill(hidden, 0.0).to(q.dtype)
    context = weights @ c_kv @ w_uv.transpose(-1, -2)
    return context.transpose(1, 2).flatten(-2)


def _visible(seq_lens: Tensor, queries: int, keys: int) -> Tensor:
    """Bool [B, S, T]: whether a query may see a position."""
    own = seq_lens[:, None].long() - queries + torch.arange(queries, device=seq_lens.device)
    return torch.arange(keys, device=seq_lens.device) <= own.unsqueeze(-1)
