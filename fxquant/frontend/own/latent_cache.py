"""Latent cache for an attention that is traced by its own forward: what it writes is appended, never written in place.

Shapes: B batch, S new positions, T = past + S positions.
"""

from typing import Any

import torch
from torch import Tensor


class BufferCache:
    """Stands for a buffer such as `kv_cache` [batch, positions, width]: written by `cache[:B, start:end] = new`.

    past [B, T - S, width]
    """

    def __init__(self, past: Tensor) -> None:
        self.past = past
        self.new: Tensor | None = None

    def __setitem__(self, index: Any, value: Tensor) -> None:
        rows, positions = index
        if rows.start not in (None, 0) or not isinstance(positions, slice) or positions.start is None:
            raise ValueError("it writes its cache at places other than the new positions")
        self.new = value

    def __getitem__(self, index: Any) -> Tensor:
        grown = self.grown()
        rows, positions = index
        whole = rows.start is None and positions.start is None and rows.step is positions.step is None
        if whole and (positions.stop is None or positions.stop == grown.shape[1]):
            return grown  # all of it: a slice would have the exporter reason about sizes
        return grown[index]

    def grown(self) -> Tensor:
        """[B, T, width]: the past and what was written."""
        if self.new is None:
            raise ValueError("it reads its cache before it writes the new positions")
        return torch.cat((self.past, self.new), 1)


class UpdatedCache:
    """Stands for a Cache of transformers whose attention stores latents.

    past [B, T - S, kv_lora_rank + qk_rope_head_dim]
    """

    def __init__(self, past: Tensor) -> None:
        self.past = past
        self.present: Tensor | None = None

    def update(self, latents: Tensor, k_rope: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """latents [B, 1, S, kv_lora_rank], k_rope [B, 1, S, qk_rope_head_dim] → both with the past, [B, 1, T, …]."""
        new = torch.cat((latents, k_rope), -1)
        if new.dim() != 4 or new.shape[-1] != self.past.shape[-1]:
            raise ValueError("it stores keys and values of every head, not the latents of DeepSeek-V3")
        self.present = torch.cat((self.past, new.squeeze(1)), 1)
        grown = self.present.unsqueeze(1)
        first, second = grown.split([latents.shape[-1], k_rope.shape[-1]], -1)
        return first, second
