"""Bounds of block operators: activations rounded as the kernels round them stay within, and use much of them."""

import pytest
import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.kernels.pack_int4 import pack_int4
from fxquant.ops.blocks import block_weight
from fxquant.verification.block_bounds import (
    block_experts_bound,
    block_linear_bound,
    distance_bound,
    rewritten_value,
)

FLOAT, INT8 = 0, 4
SIZE, INNER, HIDDEN = 32, 64, 96


@pytest.fixture(autouse=True)
def by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on x86, wherever this runs."""
    monkeypatch.setattr("fxquant.verification.block_bounds.BY_BLOCK", True)


def rounded(x: Tensor, size: int) -> Tensor:
    """Each block of `size` values to int8 and back."""
    blocks = x.double().unflatten(-1, (-1, size))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return (torch.round(blocks / step) * step).flatten(-2)


def floats(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(experts: int, n: int, k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (experts, n, k), dtype=torch.int8, generator=generator)
    second = torch.randint(1, 17, (experts, n, k // SIZE), generator=generator).float()
    return torch.stack([pack_int4(one) for one in codes]), torch.rand(experts, n, 1, generator=generator) / 99, second


def call_of(target: object, *arguments: object) -> tuple[fx.Node, dict[fx.Node, Tensor]]:
    """A call of nodes in place of tensors, and their values."""
    graph = fx.Graph()
    values = {graph.placeholder(f"a{index}"): arg for index, arg in enumerate(arguments) if isinstance(arg, Tensor)}
    nodes = iter(values)
    return graph.call_function(target, tuple(next(nodes) if isinstance(a, Tensor) else a for a in arguments)), values


def test_a_rounded_linear_is_within_its_bound_and_not_within_that_of_floats():
    packed, scale, second = (tensor[0] for tensor in weights(1, 24, HIDDEN, seed=1))
    x, bias = floats(4, 5, HIDDEN, seed=0), floats(24, seed=2)
    for level in (FLOAT, INT8):
        call, values = call_of(ops.block_linear, x, packed, scale, second, bias, SIZE, level)
        value = values.get
        expected = call.target(*(values.get(a, a) if isinstance(a, fx.Node) else a for a in call.args))
        wide = block_weight(packed, scale, second).double()
        error = (rounded(x, SIZE) @ wide.T + bias.double() - expected.double()).abs()
        bound = block_linear_bound(call, value, expected)
        assert bool((error <= bound).all()) is (level == INT8)
        assert level == FLOAT or (error / bound).max() > 0.1, "the bound says nothing"
        distance = (expected.double() - rewritten_value(call, value).double()).abs()
        assert (distance <= distance_bound(call, value, bound)).all() and (distance > bound * (level == FLOAT)).any()


@pytest.mark.parametrize("level", [FLOAT, INT8])
def test_rounded_experts_are_within_their_bound(level: int):
    gate, up, down = (weights(4, n, k, seed) for seed, (n, k) in enumerate([(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)]))
    x, ids = floats(6, HIDDEN, seed=7), torch.tensor([[0, 3], [3, 0], [1, 3], [3, 1], [0, 1], [1, 0]])
    shares = floats(6, 2, seed=8).abs()
    call, values = call_of(ops.block_experts, x, ids, shares, *gate, *up, *down, SIZE, level)
    value = values.get
    expected = ops.block_experts(x, ids, shares, *gate, *up, *down, SIZE, level)
    result = torch.zeros_like(expected, dtype=torch.float64)
    for token, (chosen, weighed) in enumerate(zip(ids.tolist(), shares.double(), strict=True)):
        for expert, share in zip(chosen, weighed, strict=True):
            g, u, d = (block_weight(*(tensor[expert] for tensor in own)).double() for own in (gate, up, down))
            row = rounded(x[token], SIZE)
            result[token] += share * (d @ rounded(torch.nn.functional.silu(g @ row) * (u @ row), SIZE))
    error, bound = (result - expected.double()).abs(), block_experts_bound(call, value, expected)
    assert bool((error <= bound).all()) is (level == INT8)
    rewritten = rewritten_value(call, value).double()
    distance = (expected.double() - rewritten).abs()
    assert rewritten.shape == expected.shape and (distance <= distance_bound(call, value, bound)).all()
    # int8 per token is what the rewritten graph rounds to
    assert 1e-3 < distance.norm() / rewritten.norm() < 5e-2
