"""Routing and routed experts against loops."""

import math

import pytest
import torch
from torch import Tensor

from fxquant import ops

U = 2.0**-24
"""Half a step of float32 relative to the value."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gate_loop(scores: list[float], biased: list[float], top_k: int, n_group: int, topk_group: int) -> list[int]:
    """Expert ids, best first, by stable sorting; all numbers are float32."""
    size = len(scores) // n_group
    groups = [list(range(start, start + size)) for start in range(0, len(scores), size)]

    def group_score(group: list[int]) -> float:
        return float(torch.tensor(sorted((biased[expert] for expert in group), reverse=True)[:2]).sum())

    best_groups = sorted(groups, key=group_score, reverse=True)[:topk_group]
    return sorted((expert for group in best_groups for expert in group), key=lambda expert: (-biased[expert], expert))[
        :top_k
    ]


BIASES = {"none": torch.zeros(256), "spread": normal(256, seed=7) / 10, "strongly negative": normal(256, seed=8) - 30}


@pytest.mark.parametrize("bias", BIASES.values(), ids=BIASES.keys())
def test_gate_chooses_like_a_loop(bias: Tensor) -> None:
    """4096 tokens of DeepSeek-V3's own gate: 256 experts, the best 4 of 8 groups, 8 experts."""
    logits = normal(4096, 256)
    ids, weights = ops.moe_gate(logits, bias, 8, 8, 4, True, 2.5)
    scores = logits.sigmoid()
    biased = (scores + bias).tolist()
    for token, plain in enumerate(scores.tolist()):
        expected = gate_loop(plain, biased[token], 8, 8, 4)
        assert ids[token].tolist() == expected
        total = sum(plain[expert] for expert in ids[token].tolist())
        for expert, weight in zip(ids[token].tolist(), weights[token].tolist(), strict=True):
            # eight scores summed, a quotient and a product: ten roundings
            assert abs(weight - 2.5 * plain[expert] / total) <= 10 * U * weight


def test_gate_without_normalization_weighs_by_the_plain_scores() -> None:
    logits, bias = normal(3, 8), torch.arange(8.0)
    ids, weights = ops.moe_gate(logits, bias, 2, 4, 2, False, 1.0)
    assert ids.tolist() == [[7, 6]] * 3  # the bias decides: it is larger than any score
    assert torch.equal(weights, logits.sigmoid().gather(-1, ids))


def test_gate_of_equal_scores_prefers_the_lower_index() -> None:
    """Equal experts, equal groups: the order is the same on every machine."""
    ids, _ = ops.moe_gate(torch.zeros(2, 32), torch.zeros(32), 6, 8, 4, True, 1.0)
    assert ids.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    bias = torch.tensor([0.0, 1.0] * 16)  # the best of each group is its second, all groups are equal
    ids, _ = ops.moe_gate(torch.zeros(1, 32), bias, 4, 16, 3, True, 1.0)
    assert ids.tolist() == [[1, 3, 5, 0]]


def test_gate_of_experts_that_never_fire_is_finite() -> None:
    _, weights = ops.moe_gate(torch.full((1, 8), -200.0), torch.zeros(8), 2, 4, 2, True, 2.5)
    assert weights.tolist() == [[0.0, 0.0]]


def test_gate_with_one_expert_a_group() -> None:
    ids, _ = ops.moe_gate(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), torch.zeros(4), 2, 4, 2, True, 1.0)
    assert ids.tolist() == [[1, 2]]


def experts_loop(x: Tensor, ids: Tensor, weights: Tensor, stacks: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """float64 outputs of tokens [N, H], and the sums of the magnitudes they are made of."""
    gate, up, down = stacks
    out, magnitude = torch.zeros(x.shape, dtype=torch.float64), torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, weight in zip(ids[token].tolist(), weights[token].double(), strict=True):
            g, u, d = gate[expert].double(), up[expert].double(), down[expert].double()
            hidden = torch.tensor([value / (1 + math.exp(-value)) for value in (g @ row).tolist()]) * (u @ row)
            out[token] += weight * (d @ hidden)
            magnitude[token] += weight * (d.abs() @ ((g.abs() @ row.abs()) * (u.abs() @ row.abs())))
    return out, magnitude


@pytest.mark.parametrize(
    "ids", [[[0, 3], [3, 0], [3, 1], [0, 1]], [[2, 2], [2, 2], [2, 2], [2, 2]]], ids=["empty", "one"]
)
def test_experts_against_loops(ids: list[list[int]]) -> None:
    """Experts that no token chose, and one expert that all tokens chose."""
    x, weights, routed = normal(4, 16), normal(4, 2, seed=1).abs(), torch.tensor(ids)
    stacks = normal(4, 12, 16, seed=2), normal(4, 12, 16, seed=3), normal(4, 16, 12, seed=4)
    exact, magnitude = experts_loop(x, routed, weights, stacks)
    result = ops.moe_experts(x.view(2, 2, 16), routed.view(2, 2, 2), weights.view(2, 2, 2), *stacks).view(4, 16)
    # dot products of 16, 16 and 12 terms, silu's slope of at most 1.1, the sum of two, and a few single roundings
    assert ((result - exact).abs() <= (1.1 * 16 + 16 + 12 + 2 + 8) * U * magnitude).all()


def test_experts_of_no_tokens() -> None:
    x, ids = torch.empty(0, 16), torch.empty(0, 2, dtype=torch.int64)
    stacks = normal(4, 12, 16), normal(4, 12, 16), normal(4, 16, 12)
    assert ops.moe_experts(x, ids, torch.empty(0, 2), *stacks).shape == (0, 16)


def test_experts_read_one_expert_at_a_time() -> None:
    """The reference takes sequences, for weights that are not in memory at once."""
    x, ids, weights = normal(4, 16), torch.tensor([[0, 1]] * 4), normal(4, 2, seed=1)
    stacks = normal(3, 12, 16, seed=2), normal(3, 12, 16, seed=3), normal(3, 16, 12, seed=4)
    reference = ops.REFERENCES[ops.moe_experts]
    lists = ([*stack[:2], None] for stack in stacks)  # expert 2 is never chosen and never read
    assert torch.equal(reference(x, ids, weights, *lists), ops.moe_experts(x, ids, weights, *stacks))


def test_init_routing_sorts_copies_by_expert_then_token() -> None:
    x = torch.arange(6.0).view(3, 2)
    ids = torch.tensor([[3, 0], [0, 1], [3, 1]])
    rows, row_index, counts = ops.moe_init_routing(x, ids, 5)
    copies = sorted((expert, token, slot) for token, row in enumerate(ids.tolist()) for slot, expert in enumerate(row))
    assert rows.tolist() == [x[token].tolist() for _, token, _ in copies]
    assert row_index.tolist() == [
        copies.index((int(ids[token, slot]), token, slot)) for token in range(3) for slot in (0, 1)
    ]
    assert counts.tolist() == [2, 2, 0, 2, 0]


def test_finalize_routing_sums_a_tokens_rows_by_weight() -> None:
    """Small integers and weights of powers of two: every product and sum is exact."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-99, 100, (2 * 5 * 3, 8), generator=generator).float()
    weights = 2.0 ** torch.randint(-3, 3, (2, 5, 3), generator=generator)
    row_index = torch.randperm(len(rows), generator=generator)
    result = ops.moe_finalize_routing(rows, row_index, weights).view(10, 8)
    for token in range(10):
        copies = [(rows[row_index[3 * token + slot]], weights.view(10, 3)[token, slot]) for slot in range(3)]
        assert torch.equal(result[token], sum(row * weight for row, weight in copies))


def test_finalize_routing_undoes_init_routing() -> None:
    x, ids = normal(2, 5, 8), torch.randint(0, 6, (2, 5, 2), generator=torch.Generator().manual_seed(0))
    rows, row_index, _ = ops.moe_init_routing(x, ids, 6)
    assert torch.equal(ops.moe_finalize_routing(rows, row_index, torch.full((2, 5, 2), 0.5)), x)
