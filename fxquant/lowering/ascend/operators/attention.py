"""Rotary embedding and attention operators. float32 inside, rounded once to the dtype of the input.

B batch, S queries, T keys, N heads, D features. Formulas: op-plugin documentation.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require
from fxquant.lowering.ascend.operators.paged_attention import NAME, Keys, expect_shape, paged_attention


def npu_interleave_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, N, S, D] in pairs (x0, y0, x1, y1, …) → halves (x0, x1, …, y0, y1, …), each pair rotated by its angle.

    cos, sin [B, 1 or N, 1 or S, D], both halves equal: `halves * cos + rotate_half(halves) * sin`. Devices take N = 1
    in cos and sin, and D = 64.
    """
    require(x.dim() == 4 and x.shape[-1] % 2 == 0, f"npu_interleave_rope: x {tuple(x.shape)} is not [B, N, S, even D]")
    batch, heads, steps, width = x.shape
    for name, table in (("cos", cos), ("sin", sin)):
        fits = table.dim() == 4 and table.shape[1] in {1, heads} and table.shape[2] in {1, steps}
        fits = fits and (table.shape[0], table.shape[3]) == (batch, width)
        require(fits, f"npu_interleave_rope: {name} {tuple(table.shape)} does not fit x {tuple(x.shape)}")
        require(table.dtype == x.dtype, f"npu_interleave_rope: {name} is {table.dtype}, x is {x.dtype}")
    first, second = x[..., 0::2].float(), x[..., 1::2].float()
    halves, rotated = torch.cat((first, second), -1), torch.cat((-second, first), -1)
    return (halves * cos.float() + rotated * sin.float()).to(x.dtype)


def npu_fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    atten_mask: Tensor | None = None,
    actual_seq_lengths_kv: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    num_heads: int = 1,
    scale: float = 1.0,
    input_layout: str = "BSH",
    num_key_value_heads: int = 0,
    block_size: int = 0,
    softmax_lse_flag: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attention over whole sequences (`_attention`) or, with block_table, over pages (`paged_attention`).

    → the context in query's layout and dtype, and a log-sum-exp: float32 [B, N, S, 1] with softmax_lse_flag, else a
    single zero.
    """
    require((query_rope is None) == (key_rope is None), f"{NAME}: query_rope and key_rope go together")
    keys = Keys(key, value, query_rope, key_rope)
    if block_table is not None:
        whole = atten_mask is None and not softmax_lse_flag and input_layout == "BNSD"
        require(whole, f"{NAME}: block_table needs input_layout 'BNSD', no atten_mask and no softmax_lse_flag here")
        shared = (num_heads, num_key_value_heads) == (query.shape[1], 1)
        require(shared, f"{NAME}: num_heads and num_key_value_heads are not {query.shape[1]} and 1")
        context = paged_attention(query, keys, block_table, actual_seq_lengths_kv, block_size, scale)
        return context, query.new_zeros(1, dtype=torch.float32)
    require(input_layout == "BSND", f"{NAME}: input_layout {input_layout!r} is not supported, only 'BSND'")
    heads = {num_heads, num_key_value_heads or num_heads}
    require(heads == {query.shape[-2]}, f"{NAME}: num_heads and num_key_value_heads are not {query.shape[-2]}")
    alone = actual_seq_lengths_kv is None and block_size == 0
    require(alone, f"{NAME}: actual_seq_lengths_kv and block_size are not supported without block_table")
    context, lse = _attention(query, keys, atten_mask, scale)
    return context, lse if softmax_lse_flag else lse.new_zeros(1)


def _attention(query: Tensor, keys: Keys, atten_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """query [B, S, N, D], key [B, T, N, D], value [B, T, N, Dv] → [B, S, N, Dv], log-sum-exp [B, N, S, 1].

    Scores are `(query · key + query_rope · key_rope) * scale`, rope [B, S or T, N, Dr]. atten_mask bool, int8 or uint8
    [B or 1, 1, S, T]: nonzero hides a key; a query that sees no key gets the mean of all values.
    """
    key, value = keys.key, keys.value
    expect_shape("key", key, (query.shape[0], key.shape[1], *query.shape[2:]))
    expect_shape("value", value, (*key.shape[:3], value.shape[-1]))
    scores = _products(query, key)
    if keys.query_rope is not None and keys.key_rope is not None:
        expect_shape("query_rope", keys.query_rope, (*query.shape[:3], keys.query_rope.shape[-1]))
        expect_shape("key_rope", keys.key_rope, (*key.shape[:3], keys.query_rope.shape[-1]))
        scores = scores + _products(keys.query_rope, keys.key_rope)
    scores = scores * scale
    if atten_mask is not None:
        scores = scores.masked_fill(_hidden(atten_mask, scores), torch.finfo(torch.float32).min)
    out = (scores.softmax(-1) @ value.transpose(1, 2).float()).transpose(1, 2).contiguous().to(query.dtype)
    return out, scores.logsumexp(-1, keepdim=True)


def _products(query: Tensor, key: Tensor) -> Tensor:
    """float32 [B, N, S, T]."""
    return query.transpose(1, 2).float() @ key.transpose(1, 2).float().transpose(-1, -2)


def _hidden(mask: Tensor, scores: Tensor) -> Tensor:
    argument = f"{NAME}: atten_mask"
    require(mask.dtype in {torch.bool, torch.int8, torch.uint8}, f"{argument} is {mask.dtype}, not bool, int8 or uint8")
    batch, _, queries, keys = scores.shape
    shapes = {(batch, 1, queries, keys), (1, 1, queries, keys)}
    require(tuple(mask.shape) in shapes, f"{argument} {tuple(mask.shape)} is not [{batch} or 1, 1, {queries}, {keys}]")
    return mask.bool()
