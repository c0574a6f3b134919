"""Block operators against float products of the weights' values, and their packing along k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxquant import ops
from fxquant.kernels.pack_int4 import pack_blocks, pack_int4, unpack_blocks
from fxquant.ops.blocks import block_weight
from fxquant.ops.library import REFERENCES
from fxquant.verification.reference import codes_along_k


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-8, 8, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 5), st.integers(1, 9))
def test_nibbles_along_k_come_back(n: int, pairs: int):
    q = codes(n, 2 * pairs, seed=n * pairs)
    packed = pack_blocks(q)
    assert packed.dtype is torch.uint8 and packed.shape == (n, pairs)
    assert torch.equal(unpack_blocks(packed), q) and torch.equal(codes_along_k(packed), q)
    assert int(packed[0, 0]) == int(q[0, 0]) + 8 + 16 * (int(q[0, 1]) + 8)


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_a_block_weight_is_code_times_scale_rounded_once(groups: int):
    q, scale = codes(6, 48), rows(6, 1, seed=1).abs()
    second = torch.randint(1, 17, (6, groups), generator=torch.Generator().manual_seed(2)).float() if groups else None
    folded = scale if second is None else scale * second
    expected = torch.stack([q[:, k].float() * folded[:, k * folded.shape[1] // 48] for k in range(48)], 1)
    assert torch.equal(block_weight(pack_int4(q), scale, second), expected)


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
@pytest.mark.parametrize("level", [0, 4])
def test_block_linear_is_a_float_product_at_both_levels(shape: tuple[int, ...], level: int):
    q, scale, bias = codes(6, 32), rows(6, 1, seed=1).abs(), rows(6, seed=2)
    x = rows(*shape, 32, seed=3)
    y = ops.block_linear(x, pack_int4(q), scale, None, bias, 16, level)
    assert torch.equal(y, torch.nn.functional.linear(x, q.float() * scale, bias))


@pytest.mark.parametrize("groups", [0, 2])
def test_block_experts_are_float_experts_over_the_values_of_the_weights(groups: int):
    experts, hidden, inner = 5, 32, 16
    weights, tensors = [], []
    for number, (n, k) in enumerate([(inner, hidden), (inner, hidden), (hidden, inner)]):
        q, scale = codes(experts, n, k, seed=number), rows(experts, n, 1, seed=number).abs() / 16
        second = torch.full((experts, n, groups), 3.0) if groups else None
        packed = torch.stack([pack_int4(one) for one in q])
        tensors += [packed, scale, second]
        weights.append(
            torch.stack([block_weight(packed[e], scale[e], second[e] if groups else None) for e in range(experts)])
        )
    x, ids = rows(2, 4, hidden, seed=7), torch.tensor([[0, 4], [4, 0], [1, 4], [4, 1]]).expand(2, 4, 2)
    shares = rows(2, 4, 2, seed=8).abs()
    result = REFERENCES[ops.block_experts](x, ids, shares, *tensors, 16, 0)
    expected = ops.moe_experts(x, ids, shares, *weights)
    # two orders of sums of products, over experts of 32 and 16 terms
    assert torch.allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    x, packed, scale = rows(3, 32), pack_int4(codes(6, 32)), rows(6, 1).abs()
    with pytest.raises(RuntimeError, match="32 features in blocks of 24"):
        torch.ops.fxq.block_linear(x.to("meta"), packed.to("meta"), scale.to("meta"), None, None, 24, 0)
