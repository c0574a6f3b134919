"""Causal mask for an attention that is traced by its own forward, for a batch of rows of unequal length."""

from typing import Any

import torch
from torch import Tensor


def additive_mask(attention_mask: Tensor, queries: int, dtype: torch.dtype) -> Tensor:
    """attention_mask int64 [B, T] → [B, S, T]: 0 where a query may see a key, else the lowest value of `dtype`.

    A query always sees itself, also on padding: no row is without a key, whatever a forward adds to the mask.
    """
    total = attention_mask.shape[1]
    keys = torch.arange(total, device=attention_mask.device)
    own = torch.arange(total - queries, total, device=attention_mask.device)[:, None]
    seen = ((keys <= own) & (attention_mask[:, None, :] != 0)) | (keys == own)
    zero = torch.zeros((), dtype=dtype, device=attention_mask.device)
    return zero.masked_fill(~seen, torch.finfo(dtype).min)


class PositionMask:
    """Stands for a mask [S, T] that is the same for every row, and is [B, S, T] inside.

    What adds a mask of its own or fills it keeps it; `unsqueeze(1)` makes room for heads: [B, S, 1, T].
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def unsqueeze(self, dim: int) -> Tensor:
        """[S, 1, T] for every row."""
        if dim != 1:
            raise ValueError(f"it reads its mask by unsqueeze({dim})")
        return self.values.unsqueeze(2)

    def __getitem__(self, index: Any) -> Tensor:
        if index == (slice(None), None) or index == (slice(None), None, slice(None)):
            return self.unsqueeze(1)
        raise ValueError(f"it reads its mask by [{index}]")

    def masked_fill(self, where: Tensor, value: float) -> "PositionMask":
        """`where` [S, T]."""
        return PositionMask(self.values.masked_fill(where, value))

    def __add__(self, other: Any) -> "PositionMask":
        return PositionMask(self.values + other)

    __radd__ = __add__

    def to(self, *_: Any, **__: Any) -> "PositionMask":
        """The same: tracing has one dtype and one device."""
        return self

    type_as = float = to
