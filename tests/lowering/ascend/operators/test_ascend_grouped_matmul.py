"""torch.ops.npu on CPU: the matmuls of experts against plain loops and the fxq:: operators."""

import re

import pytest
import torch
from ascend_calls import UNIT, floats, generator, int8, integer_product, low_words, npu, pack_int4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import ops
from fxquant.lowering.ascend.operators.grouped_matmul import split_nibbles, unpack_int4

ONE_OUTPUT = {"split_item": 2, "group_type": 0, "group_list_type": 1}


def test_nibbles_rebuild_every_int8():
    x = torch.arange(-128, 128).to(torch.int8)
    high, low = split_nibbles(x)
    assert torch.equal(16 * high.int() + low.int() + 8, x.int())
    assert min(high.min(), low.min()) == -8 and max(high.max(), low.max()) == 7
    table = {-128: (-8, -8), -17: (-2, 7), -16: (-1, -8), -1: (-1, 7), 0: (0, -8), 7: (0, -1), 8: (0, 0), 127: (7, 7)}
    for value, nibbles in table.items():
        assert (int(high[value + 128]), int(low[value + 128])) == nibbles


def test_unpack_int4():
    codes = torch.randint(-8, 8, (3, 16), generator=generator(), dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes)), codes)
    assert unpack_int4(torch.tensor([0x1], dtype=torch.int32)).tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def a8w4(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor, *, x_scale: Tensor, counts: list[int]) -> Tensor:
    """codes int8 [E, k, n], scale float32 [E, G, n]."""
    return npu.npu_grouped_matmul(
        [x], [pack_int4(codes)], scale=[low_words(scale)], bias=[bias], per_token_scale=[x_scale],
        group_list=torch.tensor(counts), output_dtype=torch.float32, **ONE_OUTPUT,
    )[0]  # fmt: skip


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=40)
def test_a8w4_is_exact_with_unit_scales(seed: int, groups: int):
    counts = [2, 0, 1]
    x = int8(3, 8, seed=seed)
    codes = torch.randint(-8, 8, (3, 8, 8), generator=generator(seed), dtype=torch.int8)
    bias = 8.0 * codes.sum(1)
    result = a8w4(x, codes, torch.ones(3, groups, 8), bias, x_scale=torch.ones(3), counts=counts)
    expected = integer_product(x[:2], codes[0]) + integer_product(x[2:], codes[2])
    assert result.tolist() == expected


@given(st.integers(0, 2**31), st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=40)
def test_a8w4_is_the_product_with_the_dequantized_weight(seed: int, groups: int):
    x = int8(3, 16, seed=seed)
    codes = torch.randint(-8, 8, (1, 16, 8), generator=generator(seed), dtype=torch.int8)
    scale, x_scale = floats(1, groups, 8, seed=seed).abs() / 16, floats(3, seed=seed).abs()
    weight = codes[0].double() * scale[0].double().repeat_interleave(16 // groups, 0)
    bias = (8 * weight.sum(0)).float()[None]
    result = a8w4(x, codes, scale, bias, x_scale=x_scale, counts=[3])
    exact = x.double() @ weight * x_scale.double()[:, None]
    # In float32 a term passes at most `groups` additions and 5 roundings more: the scale, + low, + bias, * x_scale,
    # and the bias itself. Nibbles are at most 8, so the terms' magnitudes add up to (16 * 8 + 8 + 8) * sum |weight|.
    magnitude = 144 * weight.abs().sum(0) * x_scale.double()[:, None]
    assert ((result.double() - exact).abs() <= 1.01 * (groups + 5) * UNIT * magnitude).all()


def test_a8w4_with_the_stored_bias_of_a_two_level_weight():
    """n = 2, k = 32, groups of 16; bfloat16 scales as the bias has them. Padded to n = 8 with zeros."""
    first = [-7, -7, -6, -6, -5, -5, -4, -4, -3, -3, -3, -2, -2, -1, -1, 0]
    first += [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 7]
    second = [(-7, -3, 0, 3, 7)[k % 5] for k in range(32)]
    codes = torch.zeros(1, 32, 8, dtype=torch.int8)
    codes[0, :, :2] = torch.tensor([first, second]).T
    channel = torch.tensor([16 / 119, 2 / 119]).bfloat16().float()
    scale = torch.zeros(1, 2, 8)
    scale[0, :, :2] = torch.tensor([[17.0, 17.0], [16.0, 17.0]]) * channel
    bias = torch.zeros(1, 8)
    bias[0, :2] = torch.tensor([-132.609375, -22.91015625])
    weight = codes[0].float() * scale[0].repeat_interleave(16, 0)
    x = int8(64, 32)
    # Scales have 8 bits and integers stay below 2^13: every sum is exact in float32, whatever its order.
    result = a8w4(x, codes, scale, bias, x_scale=torch.ones(64), counts=[64])
    assert torch.equal(result, x.float() @ weight)


def test_grouped_int8_matmul():
    x, weight, scale, x_scale = int8(5, 6), int8(3, 6, 4, seed=1), floats(3, 4).abs(), floats(5).abs()
    counts = torch.tensor([3, 0, 2])
    result = npu.npu_grouped_matmul(
        [x], [weight], scale=[scale], per_token_scale=[x_scale], group_list=counts, output_dtype=torch.float32,
        **ONE_OUTPUT,
    )  # fmt: skip
    assert len(result) == 1
    for row, expert in enumerate([0, 0, 0, 2, 2]):
        sums = torch.tensor(integer_product(x[row : row + 1], weight[expert])[0])
        assert torch.equal(result[0][row], sums.float() * scale[expert] * x_scale[row])
    acc = ops.grouped_int_matmul(x, weight.transpose(1, 2), counts)
    expected = ops.grouped_dequantize(acc, x_scale[:, None], scale.unsqueeze(-1), counts)
    assert torch.equal(result[0], expected)


def test_grouped_float_matmul():
    x, weight = floats(5, 6).bfloat16(), floats(3, 6, 4, seed=1).bfloat16()
    result = npu.npu_grouped_matmul([x], [weight], group_list=torch.tensor([0, 4, 1]), **ONE_OUTPUT)[0]
    assert torch.equal(result, torch.cat((x[:4] @ weight[1], x[4:] @ weight[2])))
    empty = npu.npu_grouped_matmul([x[:0]], [weight], group_list=torch.tensor([0, 0, 0]), **ONE_OUTPUT)[0]
    assert empty.shape == (0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split_item": 0}, "split_item 0"),
        ({"group_type": None}, "group_type None"),
        ({"group_list_type": 0}, "group_list_type 0"),
        ({"group_list": torch.tensor([1, 1])}, "group_list counts do not add up to 3 rows"),
        ({"group_list": torch.tensor([3])}, "group_list must be int64 [2]"),
        ({"group_list": None}, "group_list must be int64 [2]"),
        ({"x": [int8(1, 8), int8(2, 8)]}, "x must be a list of one tensor"),
        ({"x": [int8(3, 16)]}, "x has 16 features, weight 8"),
        ({"x": [floats(3, 8)]}, "x is torch.float32, weight is torch.int32"),
        ({"scale": [torch.ones(2, 8)]}, "scale torch.float32 (2, 8) is not int64 [2, G, 8]"),
        ({"scale": [low_words(torch.ones(2, 3, 8))]}, "scale has 3 groups for 8 features"),
        ({"scale": None}, "scale must be a list of one tensor"),
        ({"bias": None}, "bias must be a list of one tensor"),
        ({"bias": [torch.ones(2, 1)]}, "bias torch.float32 (2, 1) is not float32 [2, 8]"),
        ({"per_token_scale": [torch.ones(1)]}, "per_token_scale torch.float32 (1,) is not float32 [3]"),
        ({"weight": [int8(2, 8, 8)]}, "bias is not supported with an int8 weight"),
        ({"x": [floats(3, 8)], "weight": [floats(2, 8, 8)]}, "bias is not supported with a float weight"),
        ({"output_dtype": None}, "output_dtype is None"),
        ({"offset": [torch.ones(2, 8)]}, "offset is not supported"),
        ({"act_type": 5}, "act_type is not supported"),
    ],
)
def test_grouped_matmul_names_what_it_does_not_take(arguments: dict, message: str):
    call = {
        "x": [int8(3, 8)],
        "weight": [torch.zeros(2, 8, 1, dtype=torch.int32)],
        "scale": [low_words(torch.ones(2, 2, 8))],
        "bias": [torch.zeros(2, 8)],
        "per_token_scale": [torch.ones(3)],
        "group_list": torch.tensor([1, 2]),
        "output_dtype": torch.float32,
        **ONE_OUTPUT,
    }
    npu.npu_grouped_matmul(**call)
    with pytest.raises(ValueError, match=re.escape(f"npu_grouped_matmul: {message}")):
        npu.npu_grouped_matmul(**call | arguments)
