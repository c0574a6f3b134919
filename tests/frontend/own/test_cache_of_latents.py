"""A cache without writes in place, and the mask beside it."""

import pytest
import torch

from fxquant.frontend.own.latent_cache import BufferCache, UpdatedCache
from fxquant.frontend.own.position_mask import PositionMask, additive_mask
from fxquant.ops.attention import _visible


def test_a_buffer_cache_reads_as_a_buffer_does() -> None:
    generator = torch.Generator().manual_seed(0)
    past, new = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 2, 3, generator=generator)
    buffer, cache = torch.zeros(4, 16, 3), BufferCache(past)
    buffer[:2, :5] = past
    buffer[:2, 5:7], cache[:2, 5:7] = new, new
    for start in (None, 2):
        assert torch.equal(cache[:2, start:7], buffer[:2, start:7])
    assert torch.equal(cache.grown(), buffer[:2, :7])


def test_a_cache_read_too_early_or_written_elsewhere_is_an_error() -> None:
    cache = BufferCache(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="before it writes"):
        cache[:1, :2]
    with pytest.raises(ValueError, match="other than|at places"):
        cache[:1, torch.tensor([3])] = torch.zeros(1, 1, 3)


def test_an_updated_cache_takes_latents_only() -> None:
    past = torch.arange(12.0).view(1, 2, 6)
    cache = UpdatedCache(past)
    latents, k_rope = cache.update(torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 2), 0)
    assert latents.shape == (1, 1, 3, 4) and k_rope.shape == (1, 1, 3, 2)
    assert cache.present is not None and torch.equal(cache.present[:, :2], past)
    with pytest.raises(ValueError, match="every head"):
        UpdatedCache(past).update(torch.ones(1, 2, 1, 8), torch.zeros(1, 2, 1, 8))


def test_the_mask_is_that_of_the_operator_and_no_row_is_empty() -> None:
    attention = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    mask = additive_mask(attention, 3, torch.float32)
    visible = _visible(attention, 3)
    own = torch.arange(1, 4)[:, None] == torch.arange(4)
    assert torch.equal(mask == 0, visible | own)
    far = torch.tensor([[1, 0, 0, 0]] * 3, dtype=torch.bool)
    narrowed = PositionMask(mask).masked_fill(far, -torch.inf).unsqueeze(1)
    assert narrowed.shape == (2, 3, 1, 4) and torch.isfinite(narrowed).any(-1).all()
    with pytest.raises(ValueError, match="mask"):
        PositionMask(mask).unsqueeze(0)
