"""torch.ops.npu on CPU: rope and attention against plain loops and the fxq:: operators."""

import itertools
import math
import re

import pytest
import torch
from ascend_calls import UNIT, floats, npu
from torch import Tensor

from fxquant import ops


def test_interleave_rope():
    x, angle = floats(2, 3, 4, 6), floats(2, 1, 4, 3)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    result = npu.npu_interleave_rope(x, cos, sin)
    for b, n, s, pair in itertools.product(range(2), range(3), range(4), range(3)):
        first, second = x[b, n, s, 2 * pair], x[b, n, s, 2 * pair + 1]
        c, t = cos[b, 0, s, pair], sin[b, 0, s, pair]
        assert result[b, n, s, pair] == first * c + -second * t
        assert result[b, n, s, pair + 3] == second * c + first * t
    expected = ops.rope(x.transpose(1, 2).flatten(-2), cos[:, 0], sin[:, 0], 3)
    assert torch.equal(result.transpose(1, 2).flatten(-2), expected)
    every_head = npu.npu_interleave_rope(x, cos.expand(2, 3, 4, 6), sin.expand(2, 3, 4, 6))
    assert torch.equal(every_head, result)
    with pytest.raises(ValueError, match=re.escape("npu_interleave_rope: sin (2, 2, 4, 6) does not fit x")):
        npu.npu_interleave_rope(x, cos, sin.expand(2, 1, 4, 6).repeat(1, 2, 1, 1))


def attention_inputs() -> dict[str, Tensor]:
    """B 2, S 3, T 5, N 2, D 4, Dr 2, Dv 6."""
    shapes = {"query": (2, 3, 2, 4), "key": (2, 5, 2, 4), "value": (2, 5, 2, 6)}
    shapes |= {"query_rope": (2, 3, 2, 2), "key_rope": (2, 5, 2, 2)}
    return {name: floats(*shape, seed=seed) for seed, (name, shape) in enumerate(shapes.items())}


def slow_attention(tensors: dict[str, Tensor], hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """In float64, one query at a time; hidden bool [2, 3, 5]."""
    out, lse = torch.zeros(2, 3, 2, 6, dtype=torch.float64), torch.zeros(2, 2, 3, 1, dtype=torch.float64)
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    for b, s, n in itertools.product(range(2), range(3), range(2)):
        seen = [t for t in range(5) if not hidden[b, s, t]]
        if not seen:
            out[b, s, n] = wide["value"][b, :, n].mean(0)
            continue
        scores = {
            t: scale
            * sum(float(wide[q][b, s, n] @ wide[k][b, t, n]) for q, k in (("query", "key"), ("query_rope", "key_rope")))
            for t in seen
        }
        total = sum(math.exp(score) for score in scores.values())
        lse[b, n, s] = math.log(total)
        out[b, s, n] = sum(math.exp(score) / total * wide["value"][b, t, n] for t, score in scores.items())
    return out, lse


def attention_bound(tensors: dict[str, Tensor], scale: float) -> float:
    """Largest error of log-sum-exp, and of an output relative to the largest value.

    A score rounds its 6 products, 5 additions and the scale: at most 8 times along one path. Its terms' magnitudes add
    up to no more than the lengths' products. That moves a probability twice, above and below the fraction, relatively;
    exp, the sums of 5 and the division are some 16 roundings more.
    """
    longest = {name: float(tensor.norm(dim=-1).max()) for name, tensor in tensors.items()}
    reach = scale * (longest["query"] * longest["key"] + longest["query_rope"] * longest["key_rope"])
    return (2 * 8 * reach + 16) * UNIT


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int8])
def test_attention(mask_dtype: torch.dtype):
    tensors = attention_inputs()
    hidden = torch.ones(3, 5).triu(3).bool().repeat(2, 1, 1)
    hidden[0, :, 0] = True
    hidden[1, 1] = True
    out, lse = npu.npu_fused_infer_attention_score(
        **tensors, atten_mask=hidden.unsqueeze(1).to(mask_dtype), num_heads=2, scale=0.4, input_layout="BSND",
        softmax_lse_flag=True,
    )  # fmt: skip
    expected, expected_lse = slow_attention(tensors, hidden, 0.4)
    bound = attention_bound(tensors, 0.4)
    assert ((out - expected).abs() <= bound * tensors["value"].abs().max()).all()
    visible = ~hidden.all(-1)[:, None, :, None].expand(2, 2, 3, 1)
    assert ((lse - expected_lse)[visible].abs() <= bound).all()
    assert lse.dtype == torch.float32


def test_attention_is_that_of_the_dialect():
    tensors = attention_inputs()
    tensors["key_rope"] = tensors["key_rope"][:, :, :1].expand(2, 5, 2, 2)
    mask = torch.ones(2, 5, dtype=torch.int64)
    mask[0, 0] = 0
    q = torch.cat((tensors["query"], tensors["query_rope"]), -1).flatten(-2)
    kv = torch.cat((tensors["key"], tensors["value"]), -1).flatten(-2)
    expected = ops.mla_attention(q, kv, tensors["key_rope"][:, :, 0], mask, 2, 6, 0.4).unflatten(-1, (2, 6))
    hidden = torch.ones(3, 5).triu(3).bool() | (mask[:, None, :] == 0)
    out, lse = npu.npu_fused_infer_attention_score(
        **tensors, atten_mask=hidden.unsqueeze(1), num_heads=2, scale=0.4, input_layout="BSND"
    )
    # The same sums of the same terms, whose order inside a matmul may follow memory layout: each is within the bound.
    assert ((out - expected).abs() <= 2 * attention_bound(tensors, 0.4) * tensors["value"].abs().max()).all()
    assert lse.tolist() == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_layout": "BSH"}, "input_layout 'BSH' is not supported"),
        ({"num_heads": 4}, "num_heads and num_key_value_heads are not 2"),
        ({"num_key_value_heads": 1}, "num_heads and num_key_value_heads are not 2"),
        ({"key_rope": None}, "query_rope and key_rope go together"),
        ({"key": floats(2, 5, 2, 3)}, "key is (2, 5, 2, 3), not (2, 5, 2, 4)"),
        ({"value": floats(2, 4, 2, 6)}, "value is (2, 4, 2, 6), not (2, 5, 2, 6)"),
        ({"atten_mask": torch.zeros(3, 5, dtype=torch.bool)}, "atten_mask (3, 5) is not [2 or 1, 1, 3, 5]"),
        ({"atten_mask": torch.zeros(2, 1, 3, 5)}, "atten_mask is torch.float32"),
        ({"sparse_mode": 3}, "sparse_mode is not supported"),
        ({"actual_seq_lengths": [3, 3]}, "actual_seq_lengths is not supported"),
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table needs input_layout 'BNSD'"),
    ],
)
def test_attention_names_what_it_does_not_take(arguments: dict, message: str):
    call = attention_inputs() | {"num_heads": 2, "input_layout": "BSND"}
    npu.npu_fused_infer_attention_score(**call)
    with pytest.raises(ValueError, match=re.escape(f"npu_fused_infer_attention_score: {message}")):
        npu.npu_fused_infer_attention_score(**call | arguments)
