"""Slot: what the running layer passes to its attention, bypassing the user's code between them."""

from torch import Tensor


class Slot:
    """cos, sin [B, S, qk_rope_head_dim]; attention_mask int64 [B, T]; past, present [B, …, latent]."""

    cos: Tensor
    sin: Tensor
    attention_mask: Tensor
    past: Tensor
    present: Tensor | None = None
