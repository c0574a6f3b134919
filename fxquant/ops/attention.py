"""Rotary embedding and multi-head latent attention (DeepSeek-V2, arXiv:2405.04434).

Heads stay flattened in the last dimension, so a block traces to a dozen nodes and no reshapes.
Shapes: B batch, S new positions, T = past + S positions, H heads.
"""

import torch
from torch import Tensor

from fxquant.ops.dense import linear
from fxquant.ops.library import define, expect


def _rope_table_shape(position_ids: Tensor, inv_freq: list[float], scale: float) -> tuple[Tensor, Tensor]:
    shape = (*position_ids.shape, 2 * len(inv_freq))
    return position_ids.new_empty(shape, dtype=torch.float32), position_ids.new_empty(shape, dtype=torch.float32)


@define("rope_table(Tensor position_ids, float[] inv_freq, float scale) -> (Tensor, Tensor)", _rope_table_shape)
def rope_table(position_ids: Tensor, inv_freq: list[float], scale: float) -> tuple[Tensor, Tensor]:
    """position_ids int64 [B, S] → cos, sin float32 [B, S, 2·len(inv_freq)], both halves equal, times `scale`.

    Angles are `position * inv_freq` in float32; `scale` is YaRN's attention factor (arXiv:2309.00071), or 1.
    """
    frequency = torch.tensor(inv_freq, dtype=torch.float32, device=position_ids.device)
    angle = position_ids[..., None].float() * frequency
    angle = torch.cat((angle, angle), -1)
    return angle.cos() * scale, angle.sin() * scale


def _rope_shape(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    expect(x.shape[-1] % num_heads == 0, f"fxq::rope: {x.shape[-1]} features do not split into {num_heads} heads")
    expect(x.shape[-1] // num_heads >= cos.shape[-1], "fxq::rope: the head is narrower than the table")
    return x.new_empty(x.shape)


@define("rope(Tensor x, Tensor cos, Tensor sin, int num_heads) -> Tensor", _rope_shape)
def rope(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """Rotate the last `cos.shape[-1]` features of each head; the features before them are unchanged.

    x [B, S, num_heads·D]. DeepSeek stores the rotated pairs interleaved (x0, y0, x1, y1, …): they are first
    de-interleaved to halves (x0, x1, …, y0, y1, …), then `halves * cos + rotate_half(halves) * sin`. The result stays
    in halves. Queries and keys use the same order, so their dot products equal those in DeepSeek's order.
    """
    heads = x.unflatten(-1, (num_heads, -1))
    width = cos.shape[-1]
    unrotated, features = heads[..., :-width], heads[..., -width:]
    first, second = features[..., 0::2], features[..., 1::2]
    halves, rotated = torch.cat((first, second), -1), torch.cat((-second, first), -1)
    cos, sin = cos.to(x.dtype).unsqueeze(-2), sin.to(x.dtype).unsqueeze(-2)
    return torch.cat((unrotated, halves * cos + rotated * sin), -1).flatten(-2)


def _mla_attention_shape(
    q: Tensor, kv: Tensor, k_rope: Tensor, attention_mask: Tensor, num_heads: int, v_head_dim: int, softmax_scale: float
) -> Tensor:
    expect(
        q.shape[-1] // num_heads - k_rope.shape[-1] == kv.shape[-1] // num_heads - v_head_dim,
        f"fxq::mla_attention: queries of {q.shape[-1]} do not match keys of {kv.shape[-1]} and {k_rope.shape[-1]}",
    )
    return q.new_empty((*q.shape[:-1], num_heads * v_head_dim))


@define(
    "mla_attention(Tensor q, Tensor kv, Tensor k_rope, Tensor attention_mask, int num_heads, int v_head_dim, "
    "float softmax_scale) -> Tensor",
    _mla_attention_shape,
)
def mla_attention(
    q: Tensor, kv: Tensor, k_rope: Tensor, attention_mask: Tensor, num_heads: int, v_head_dim: int, softmax_scale: float
) -> Tensor:
    """Causal attention of S queries, the last of T positions; the softmax is in float32.

    q [B, S, H·(nope + rope)], per head (nope, rope); kv [B, T, H·(nope + v_head_dim)], per head (key nope, value);
    k_rope [B, T, rope], shared by all heads; attention_mask int64 [B, T], 0 where a position is padding.
    Query i sees key j when j <= T - S + i and the mask is 1; a query that sees no key gets the mean of all values.
    → [B, S, H·v_head_dim].
    """
    queries = q.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    nope, value = (
        kv.unflatten(-1, (num_heads, -1))
        .transpose(1, 2)
        .split_with_sizes([kv.shape[-1] // num_heads - v_head_dim, v_head_dim], -1)
    )
    width = k_rope.shape[-1]
    scores = queries[..., :-width] @ nope.transpose(-1, -2)
    scores = scores + queries[..., -width:] @ k_rope.unsqueeze(1).transpose(-1, -2)
    hidden = ~_visible(attention_mask, queries.shape[-2]).unsqueeze(1)
    # finfo.min, not -inf: a query that sees no key would get NaN
    scores = (scores * softmax_scale).float().masked_fill(hidden, torch.finfo(torch.float32).min)
    return (scores.softmax(-1).to(q.dtype) @ value).transpose(1, 2).flatten(-2)


def _attend_latents_shape(
    q: Tensor, c_kv: Tensor, k_rope: Tensor, kv_b_weight: Tensor, attention_mask: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    expect(
        c_kv.shape[-1] == kv_b_weight.shape[1],
        f"fxq::attend_latents: latents of {c_kv.shape[-1]}, a weight for {kv_b_weight.shape[1]}",
    )
    nope = kv_b_weight.shape[0] // num_heads - v_head_dim
    expect(
        q.shape[-1] == num_heads * (nope + k_rope.shape[-1]),
        f"fxq::attend_latents: queries of {q.shape[-1]} are not {num_heads} heads of {nope} and {k_rope.shape[-1]}",
    )
    return q.new_empty((*q.shape[:-1], num_heads * v_head_dim))


@define(
    "attend_latents(Tensor q, Tensor c_kv, Tensor k_rope, Tensor kv_b_weight, Tensor attention_mask, "
    "int num_heads, int v_head_dim, float softmax_scale) -> Tensor",
    _attend_latents_shape,
)
def attend_latents(
    q: Tensor, c_kv: Tensor, k_rope: Tensor, kv_b_weight: Tensor, attention_mask: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """`fxq::mla_attention` with keys and values `linear(c_kv, kv_b_weight)`.

    As one operator it leaves the order of products to the target: W_UK and W_UV, the halves of kv_b_weight
    [H·(nope + v_head_dim), rank], may as well be multiplied with queries and context (see `fxq::latent_attention`).
    q [B, S, H·(nope + rope)], c_kv [B, T, rank], k_rope [B, T, rope], attention_mask int64 [B, T]
    → [B, S, H·v_head_dim].
    """
    kv = linear(c_kv, kv_b_weight)
    return mla_attention(q, kv, k_rope, attention_mask, num_heads, v_head_dim, softmax_scale)


def _attend_halves_shape(
    q: Tensor, key: Tensor, value: Tensor, kv_b_weight: Tensor, attention_mask: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    expect(
        key.dim() == 4 and key.shape == value.shape and key.shape[1] == 1,
        "fxq::attend_halves: key and value are not halves [B, 1, T, width] of latents",
    )
    nope, rope = kv_b_weight.shape[0] // num_heads - v_head_dim, 2 * key.shape[-1] - kv_b_weight.shape[1]
    expect(
        q.shape[-1] == num_heads * (nope + rope),
        f"fxq::attend_halves: queries of {q.shape[-1]} are not {num_heads} heads of {nope} and {rope}",
    )
    return q.new_empty((*q.shape[:-1], num_heads * v_head_dim))


@define(
    "attend_halves(Tensor q, Tensor key, Tensor value, Tensor kv_b_weight, Tensor attention_mask, "
    "int num_heads, int v_head_dim, float softmax_scale) -> Tensor",
    _attend_halves_shape,
)
def attend_halves(
    q: Tensor, key: Tensor, value: Tensor, kv_b_weight: Tensor, attention_mask: Tensor, num_heads: int,
    v_head_dim: int, softmax_scale: float,
) -> Tensor:  # fmt: skip
    """`fxq::attend_latents` over latents (c_kv, k_rope) in two halves, bit for bit.

    q [B, S, H·(nope + rope)]; key, value [B, 1, T, (rank + rope) / 2], the first and the second half of each latent;
    kv_b_weight [H·(nope + v_head_dim), rank], attention_mask int64 [B, T] → [B, S, H·v_head_dim].
    """
    latents, rank = torch.cat((key, value), -1).squeeze(1), kv_b_weight.shape[1]
    c_kv, k_rope = latents[..., :rank], latents[..., rank:]
    return attend_latents(q, c_kv, k_rope, kv_b_weight, attention_mask, num_heads, v_head_dim, softmax_scale)


def _expand_heads_shape(kv: Tensor, k_rope: Tensor, num_heads: int, v_head_dim: int) -> tuple[Tensor, Tensor]:
    expect(kv.shape[-1] % num_heads == 0, f"fxq::expand_heads: {kv.shape[-1]} features are not {num_heads} heads")
    batch, new = kv.shape[:2]
    width = kv.shape[-1] // num_heads - v_head_dim + k_rope.shape[-1]
    return kv.new_empty((batch, num_heads, new, width)), kv.new_empty((batch, num_heads, new, v_head_dim))


@define(
    "expand_heads(Tensor kv, Tensor k_rope, int num_heads, int v_head_dim) -> (Tensor, Tensor)", _expand_heads_shape
)
def expand_heads(kv: Tensor, k_rope: Tensor, num_heads: int, v_head_dim: int) -> tuple[Tensor, Tensor]:
    """Keys and values of each head, as `fxq::mla_attention` reads them: the rotated part is the same in all heads.

    kv [B, S, H·(nope + v_head_dim)], per head (key nope, value); k_rope [B, S, rope]
    → key [B, H, S, nope + rope], value [B, H, S, v_head_dim].
    """
    heads = kv.unflatten(-1, (num_heads, -1)).transpose(1, 2)
    nope, value = heads.tensor_split((heads.shape[-1] - v_head_dim,), -1)
    shared = k_rope.unsqueeze(1).expand(-1, num_heads, -1, -1)
    return torch.cat((nope, shared), -1), value.contiguous()


def _attend_heads_shape(q: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, softmax_scale: float) -> Tensor:
    expect(key.dim() == 4 and value.dim() == 4, "fxq::attend_heads: key and value are not [B, H, T, width]")
    expect(
        q.shape[-1] == key.shape[1] * key.shape[-1],
        f"fxq::attend_heads: queries of {q.shape[-1]} are not {key.shape[1]} heads of {key.shape[-1]}",
    )
    return q.new_empty((*q.shape[:-1], value.shape[1] * value.shape[-1]))


@define(
    "attend_heads(Tensor q, Tensor key, Tensor value, Tensor attention_mask, float softmax_scale) -> Tensor",
    _attend_heads_shape,
)
def attend_heads(q: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, softmax_scale: float) -> Tensor:
    """`fxq::mla_attention` over keys and values that `fxq::expand_heads` made.

    q [B, S, H·width], key [B, H, T, width], value [B, H, T, v], attention_mask int64 [B, T] → [B, S, H·v].
    A score is one sum over the width of a head, where `mla_attention` adds those of its two parts.
    """
    queries = q.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
    hidden = ~_visible(attention_mask, q.shape[1]).unsqueeze(1)
    scores = (queries @ key.transpose(-1, -2) * softmax_scale).float()
    scores = scores.masked_fill(hidden, torch.finfo(torch.float32).min)
    return (scores.softmax(-1).to(q.dtype) @ value).transpose(1, 2).flatten(-2)


def _visible(attention_mask: Tensor, queries: int) -> Tensor:
    """Bool [B, S, T]: whether a query may see a key."""
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    last = torch.arange(total - queries, total, device=attention_mask.device)
    return (keys <= last[:, None]) & (attention_mask[:, None, :] != 0)
