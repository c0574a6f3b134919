"""The ONNX target: attention over latents in both orders of its products, against keys and values that are formed."""

from pathlib import Path

import pytest
import torch
from onnx_calls import UNIT, both, floats
from torch import Tensor

from fxquant import ops
from fxquant.lowering.onnx.builder import Builder

HEADS, NOPE, ROPE, VALUE, RANK, SCALE = 4, 8, 4, 16, 12, 0.25
FORCED = {
    "absorbed": lambda b, condition, name, then, other_name, otherwise: then(b),
    "formed": lambda b, condition, name, then, other_name, otherwise: otherwise(b),
}


def reach(q: Tensor, c_kv: Tensor, k_rope: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the terms of a score and of a value add up to in magnitude, at most."""
    w_uk, w_uv = weight.float().unflatten(0, (HEADS, -1)).split([NOPE, VALUE], 1)
    heads = q.abs().unflatten(-1, (HEADS, -1)).transpose(1, 2)
    keys = c_kv.abs().unsqueeze(1) @ w_uk.abs().transpose(-1, -2)
    scores = heads[..., :NOPE] @ keys.transpose(-1, -2)
    scores = scores + heads[..., NOPE:] @ k_rope.abs().unsqueeze(1).transpose(-1, -2)
    return SCALE * scores.max(), (c_kv.abs().unsqueeze(1) @ w_uv.abs().transpose(-1, -2)).max()


@pytest.mark.parametrize("order", ["absorbed", "formed", "cheaper"])
@pytest.mark.parametrize("queries", [1, 3, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("halves", [False, True])
def test_any_order_of_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, queries: int, dtype: torch.dtype, halves: bool
):
    if order in FORCED:
        monkeypatch.setattr(Builder, "either", FORCED[order])
    # the second batch row begins with padding, the third is padding throughout
    mask = torch.tensor([[1] * 9, [0, 0, *[1] * 7], [0] * 9])
    q, c_kv, k_rope = floats(3, queries, HEADS * (NOPE + ROPE)), floats(3, 9, RANK, seed=1), floats(3, 9, ROPE, seed=2)
    weight = floats(HEADS * (NOPE + VALUE), RANK, seed=3).to(dtype)
    shared = (weight, mask, HEADS, VALUE, SCALE)
    if halves:
        key, values = torch.cat((c_kv, k_rope), -1).unsqueeze(1).chunk(2, -1)
        pairs = both(tmp_path, ops.attend_halves, q, key, values, *shared, stored=("kv_b_weight",))
    else:
        pairs = both(tmp_path, ops.attend_latents, q, c_kv, k_rope, *shared, stored=("kv_b_weight",))
    ((emitted, reference),) = pairs
    score, value = reach(q, c_kv, k_rope, weight)
    # on each side a score sums nope, rank and rope terms, and moves its probability by twice its error; then 9 values,
    # of rank terms each
    steps = 2 * (2 * score * (NOPE + RANK + ROPE + 6) + 9 + RANK + NOPE + 10)
    assert ((emitted - reference).abs() <= steps * UNIT * value).all()


def test_no_queries_and_no_keys_before_them(tmp_path: Path):
    mask, weight = torch.ones(2, 5, dtype=torch.int64), floats(HEADS * (NOPE + VALUE), RANK, seed=3)
    q, c_kv, k_rope = floats(2, 0, HEADS * (NOPE + ROPE)), floats(2, 5, RANK, seed=1), floats(2, 5, ROPE, seed=2)
    arguments = (q, c_kv, k_rope, weight, mask, HEADS, VALUE, SCALE)
    ((emitted, _),) = both(tmp_path, ops.attend_latents, *arguments, stored=("kv_b_weight",))
    assert emitted.shape == (2, 0, HEADS * VALUE)


def test_keys_and_values_of_all_heads(tmp_path: Path):
    kv, k_rope = floats(2, 9, HEADS * (NOPE + VALUE)), floats(2, 9, ROPE, seed=1)
    (key, same), (value, equal) = both(tmp_path, ops.expand_heads, kv, k_rope, HEADS, VALUE)
    assert torch.equal(key, same) and torch.equal(value, equal)
    q, mask = floats(2, 3, HEADS * (NOPE + ROPE), seed=2), torch.tensor([[1] * 9, [0, 0, *[1] * 7]])
    ((emitted, reference),) = both(tmp_path, ops.attend_heads, q, key, value, mask, SCALE)
    heads = q.abs().unflatten(-1, (HEADS, -1)).transpose(1, 2)
    score = SCALE * (heads @ key.abs().transpose(-1, -2)).max()
    # as above, with scores that are one sum each and values as they are
    steps = 2 * (2 * score * (NOPE + ROPE + 2) + 9 + 10)
    assert ((emitted - reference).abs() <= steps * UNIT * value.abs().max()).all()
    expected = ops.mla_attention(q, kv, k_rope, mask, HEADS, VALUE, SCALE)
    assert ((reference - expected).abs() <= steps * UNIT * value.abs().max()).all()
