"""Paged attention of one query per sequence. float32 inside, rounded once to the dtype of the query.

B batch, N heads, D features. Formula and limits: op-plugin documentation, part on MLA with block_table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require

NAME = "npu_fused_infer_attention_score"


@dataclass(frozen=True)
class Keys:
    """Keys and values, and the rotary parts of keys and queries."""

    key: Tensor
    value: Tensor
    query_rope: Tensor | None
    key_rope: Tensor | None


def paged_attention(
    query: Tensor, keys: Keys, block_table: Tensor, lengths: Sequence[int] | None, block_size: int, scale: float
) -> Tensor:
    """Multi-head latent attention of decoding: all heads share one key, which is also the value.

    query [B, N, 1, D], query_rope [B, N, 1, Dr]; key and value [num_blocks, 1, block_size, D], key_rope
    [num_blocks, 1, block_size, Dr]; block_table int32 [B, blocks], the pages of each sequence in order; lengths: how
    many of their positions are valid. Scores are `(query · key + query_rope · key_rope) * scale` → [B, N, 1, D], zeros
    for a sequence without positions. Devices take D = 512, Dr = 64, N a power of two up to 128, blocks of 16 to 1024.
    """
    if keys.query_rope is None or keys.key_rope is None or lengths is None:
        raise ValueError(f"{NAME}: block_table needs query_rope, key_rope and actual_seq_lengths_kv here")
    require(query.shape[2] == 1, f"{NAME}: query has {query.shape[2]} steps, with block_table only 1 is supported")
    width, rope = query.shape[-1], keys.query_rope.shape[-1]
    expect_shape("query_rope", keys.query_rope, (*query.shape[:3], rope))
    for argument, pages, features in (("key", keys.key, width), ("value", keys.value, width)):
        expect_shape(argument, pages, (len(keys.key), 1, block_size, features))
    expect_shape("key_rope", keys.key_rope, (len(keys.key), 1, block_size, rope))
    fits = block_table.dtype == torch.int32 and block_table.dim() == 2 and len(block_table) == len(query)
    require(fits and len(lengths) == len(query), f"{NAME}: block_table or actual_seq_lengths_kv has other rows")
    reach = block_table.shape[1] * block_size
    require(all(0 <= length <= reach for length in lengths), f"{NAME}: actual_seq_lengths_kv is not within {reach}")
    out = torch.zeros_like(query)
    for row, length in enumerate(lengths):
        if length:
            used = block_table[row, : -(-length // block_size)].long()
            key, value, rope_keys = (
                pages[used].flatten(0, 2)[:length].float() for pages in (keys.key, keys.value, keys.key_rope)
            )
            scores = query[row, :, 0].float() @ key.T + keys.query_rope[row, :, 0].float() @ rope_keys.T
            out[row, :, 0] = ((scores * scale).softmax(-1) @ value).to(query.dtype)
    return out


def expect_shape(argument: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has this shape."""
    fits = tuple(tensor.shape) == tuple(shape)
    require(fits, f"{NAME}: {argument} is {tuple(tensor.shape)}, not {tuple(shape)}")
