"""torch.ops.npu on CPU: gate and routing against plain loops and the fxq:: operators."""

import re

import pytest
import torch
from ascend_calls import UNIT, floats, npu
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import ops

GATE = {"k_group": 2, "group_count": 4, "group_select_mode": 1, "norm_type": 1, "out_flag": True}


def slow_gate(scores: list[float], bias: list[float], k: int) -> list[int]:
    """Four groups, the best two by their two best experts, then the k best; float32 sums as Python sees them."""
    choice = [float(torch.tensor(score) + torch.tensor(extra)) for score, extra in zip(scores, bias, strict=True)]
    size = len(choice) // 4
    groups = [sorted(choice[group * size : (group + 1) * size])[-2:] for group in range(4)]
    sums = [float(torch.tensor(first) + torch.tensor(second)) for first, second in groups]
    best = sorted(range(4), key=lambda group: (-sums[group], group))[:2]
    experts = [expert for expert in range(len(choice)) if expert // size in best]
    return sorted(experts, key=lambda expert: (-choice[expert], expert))[:k]


@given(st.integers(0, 2**31), st.booleans())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_gate(seed: int, ties: bool):
    x, bias = floats(3, 16, seed=seed), floats(16, seed=seed + 1) / 4
    if ties:
        x, bias = x.round(), torch.zeros(16)
    weights, ids, scores = npu.npu_moe_gating_top_k(x, 3, bias=bias, routed_scaling_factor=2.5, **GATE)
    assert ids.dtype == torch.int32 and torch.equal(scores, x.sigmoid())
    for row in range(3):
        expected = slow_gate(scores[row].tolist(), bias.tolist(), 3)
        assert ids[row].tolist() == expected
        total = sum(float(scores[row, expert]) for expert in expected)
        for slot, expert in enumerate(expected):
            # Two additions, + eps, a division and a product: 5 roundings.
            assert float(weights[row, slot]) == pytest.approx(float(scores[row, expert]) / total * 2.5, rel=6 * UNIT)
    if not ties:  # fxq::moe_gate leaves the order of equals open
        reference_ids, reference_weights = ops.moe_gate(x, bias, 3, 4, 2, True, 2.5)
        assert torch.equal(ids.long(), reference_ids) and torch.equal(weights, reference_weights)


def test_gate_excludes_groups_even_if_all_choices_are_negative():
    x = torch.tensor([[9.0, -9, -9, -9, 1, 1, -9, -9, 0.5, 0.5, -9, -9, -1, -1, -9, -9]])
    # Group 0 has the best expert, yet not one of the best sums of two. The bias makes every choice negative.
    _, ids, _ = npu.npu_moe_gating_top_k(x, 4, bias=torch.full((16,), -2.0), **GATE)
    assert ids.tolist() == [[4, 5, 8, 9]]


def test_gate_takes_the_lower_id_of_equals():
    _, ids, _ = npu.npu_moe_gating_top_k(torch.zeros(2, 256), 8, **GATE)
    assert ids.tolist() == [list(range(8))] * 2


def test_gate_without_scores_bias_or_float32():
    x = floats(3, 16).bfloat16()
    weights, ids, scores = npu.npu_moe_gating_top_k(x, 3, **GATE | {"out_flag": False})
    assert weights.dtype == torch.bfloat16 and ids.shape == (3, 3) and scores.shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"norm_type": 0}, "norm_type 0 is not supported"),
        ({"group_select_mode": 0}, "group_select_mode 0 is not supported"),
        ({"group_count": 3}, "x (3, 16), group_count 3"),
        ({"k_group": 5}, "k_group 5 of group_count 4"),
        ({"k": 9}, "k is 9, but 2 groups hold 8 experts"),
        ({"bias": torch.zeros(16).bfloat16()}, "bias is torch.bfloat16, x is torch.float32"),
        ({"renorm": 1}, "renorm is not supported"),
    ],
)
def test_gate_names_what_it_does_not_take(arguments: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(f"npu_moe_gating_top_k: {message}")):
        npu.npu_moe_gating_top_k(**{"x": floats(3, 16), "k": 3} | GATE | arguments)


ROUTING = {"expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}


def test_init_routing():
    x, ids = floats(3, 5), torch.tensor([[2, 0], [0, 3], [2, 3]], dtype=torch.int32)
    rows, row_index, counts, _ = npu.npu_moe_init_routing_v2(x, ids, active_num=6, **ROUTING)
    assert row_index.dtype == torch.int32 and row_index.tolist() == [2, 0, 1, 4, 3, 5]
    assert counts.dtype == torch.int64 and counts.tolist() == [2, 0, 2, 2]
    assert torch.equal(rows, x[[0, 1, 0, 2, 1, 2]])
    expected = ops.moe_init_routing(x, ids, 4)
    assert torch.equal(rows, expected[0]) and torch.equal(row_index.long(), expected[1])
    weights = floats(3, 2, seed=1)
    merged = npu.npu_moe_token_unpermute(rows * 3, row_index, probs=weights)
    assert torch.equal(merged, ops.moe_finalize_routing(rows * 3, expected[1], weights))


def test_init_routing_of_some_experts():
    x, ids = floats(3, 5), torch.tensor([[2, 0], [0, 3], [2, 1]], dtype=torch.int32)
    rows, row_index, counts, _ = npu.npu_moe_init_routing_v2(x, ids, active_expert_range=[1, 3], **ROUTING)
    assert counts.tolist() == [1, 2]
    assert row_index.tolist() == [1, -1, -1, -1, 2, 0]
    assert torch.equal(rows[:3], x[[2, 0, 2]]) and not rows[3:].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_idx": torch.zeros(3, 2, dtype=torch.int64)}, "expert_idx is torch.int64"),
        ({"expert_idx": torch.full((3, 2), 4, dtype=torch.int32)}, "expert_idx is not within the 4 experts"),
        ({"expert_num": -1}, "expert_num is -1"),
        ({"active_num": 3}, "active_num 3 drops rows"),
        ({"active_expert_range": [0, 5]}, "active_expert_range [0, 5) of 4 experts"),
        ({"expert_tokens_num_type": 0}, "expert_tokens_num_type 0 is not supported"),
        ({"expert_tokens_num_flag": False}, "expert_tokens_num_flag must be True"),
        ({"quant_mode": 1}, "quant_mode is not supported"),
        ({"row_idx_type": 1}, "row_idx_type is not supported"),
        ({"drop_pad_mode": 1}, "drop_pad_mode is not supported"),
    ],
)
def test_init_routing_names_what_it_does_not_take(arguments: dict, message: str):
    call = {"x": floats(3, 5), "expert_idx": torch.zeros(3, 2, dtype=torch.int32), **ROUTING}
    with pytest.raises(ValueError, match=re.escape(f"npu_moe_init_routing_v2: {message}")):
        npu.npu_moe_init_routing_v2(**call | arguments)


def test_token_unpermute():
    rows, index, probs = floats(6, 4), torch.tensor([3, 0, 5, 1, 2, 4], dtype=torch.int32), floats(3, 2, seed=1)
    merged = npu.npu_moe_token_unpermute(rows, index, probs)
    for token in range(3):
        first, second = (rows[int(index[2 * token + slot])] * probs[token, slot] for slot in range(2))
        assert torch.equal(merged[token], first + second)
    rows16, probs16 = rows.bfloat16(), probs.bfloat16()
    rounded = npu.npu_moe_token_unpermute(rows16.float(), index, probs16.float()).bfloat16()
    assert torch.equal(npu.npu_moe_token_unpermute(rows16, index, probs16), rounded)
    assert torch.equal(npu.npu_moe_token_unpermute(rows, index), rows[index.long()])
    with pytest.raises(ValueError, match=re.escape("npu_moe_token_unpermute: probs (2, 2) for 6 sorted_indices")):
        npu.npu_moe_token_unpermute(rows, index, probs[:2])
    with pytest.raises(ValueError, match="npu_moe_token_unpermute: sorted_indices are not within 6 permuted_tokens"):
        npu.npu_moe_token_unpermute(rows, index - 1, probs)
