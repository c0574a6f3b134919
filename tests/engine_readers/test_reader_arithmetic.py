"""Device roundings against their definitions, value by value."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reader_folders import Draft
from torch import Tensor

from fxquant.engine_readers.activation import PerTensor, PerToken
from fxquant.engine_readers.arithmetic import (
    Arithmetic,
    float32_bits,
    half_step,
    nibbles,
    quantize_per_token,
    truncate_fp19,
)
from fxquant.engine_readers.int4_terms import TwoLevel
from fxquant.engine_readers.packed_layout import pack_layout
from fxquant.engine_readers.packed_shard import PackedShard

DTYPES = (torch.bfloat16, torch.float16)


def test_an_activation_is_sixteen_hi_plus_lo_plus_eight() -> None:
    x = torch.arange(-128, 128).to(torch.int8)
    high, low = nibbles(x)
    assert torch.equal(16 * high + low + 8, x.double())
    assert all(part.min() >= -8 and part.max() <= 7 for part in (high, low))
    samples = {-128: (-8, -8), -17: (-2, 7), -16: (-1, -8), -1: (-1, 7), 0: (0, -8), 7: (0, -1), 8: (0, 0), 127: (7, 7)}
    assert {v: (int(high[v + 128]), int(low[v + 128])) for v in samples} == samples


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False), min_size=1, max_size=5))
def test_per_token_codes_are_those_of_one_row_after_another(row: list[float]) -> None:
    codes, scale = quantize_per_token(torch.tensor([row]))
    largest = max(abs(value) for value in row)
    if largest < 1e-30:
        assert codes.tolist() == [[0] * len(row)]
        return
    factor = torch.tensor(127.0) / torch.tensor(largest)
    assert codes.tolist() == [[round(float(torch.tensor(value) * factor)) for value in row]]
    assert float(scale) == float(torch.tensor(largest) / 127)


def test_a_row_of_zeros_has_scale_zero() -> None:
    codes, scale = quantize_per_token(torch.zeros(2, 3))
    assert not codes.any() and not scale.any()


def test_int64_scales_carry_float32_bits_and_the_device_reads_19() -> None:
    stored = torch.tensor([1065353216, 1011451376])
    assert torch.equal(float32_bits(stored), torch.tensor([1.0, 0.0123]))
    assert truncate_fp19(torch.tensor([0.0123])).view(torch.int32).item() == 1011449856
    assert torch.equal(float32_bits(torch.tensor([-1090519040, 3204448256])), torch.tensor([-0.5, -0.5]))


@given(st.floats(0, 2.0**15, width=32, allow_subnormal=False), st.sampled_from(DTYPES))
def test_half_a_step_bounds_the_rounding(value: float, dtype: torch.dtype) -> None:
    exact = torch.tensor([value])
    assert (exact.to(dtype).double() - exact.double()).abs() <= half_step(exact, dtype)
    assert half_step(exact.to(dtype).float(), dtype) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_static_codes_divide_exactly_or_multiply_by_a_rounded_reciprocal(dtype: torch.dtype) -> None:
    scale, offset = torch.tensor([0.0333], dtype=dtype), torch.tensor([-7.0], dtype=dtype)
    x = torch.linspace(-6, 6, 501)
    exact, kernel = (PerTensor(scale, offset, True).quantize(x, arithmetic)[0].tolist() for arithmetic in Arithmetic)
    reciprocal = (1 / scale).float()
    arrived = x.to(dtype).float()
    for index in range(len(x)):
        assert exact[index] == clamp(round(float(x[index] / scale.float() - 7)))
        assert kernel[index] == clamp(round(float(arrived[index] * reciprocal - 7)))
    assert exact != kernel
    divided = PerTensor(scale, offset, False).quantize(x, Arithmetic.KERNEL)[0].tolist()
    assert divided == [clamp(round(float(value / scale.float() - 7))) for value in arrived]


def clamp(value: int) -> int:
    return max(-128, min(127, value))


def test_on_the_device_activations_come_in_the_models_dtype() -> None:
    x = torch.tensor([[1.0, 0.501]])
    exact, kernel = (PerToken(torch.bfloat16).quantize(x, arithmetic)[0].tolist() for arithmetic in Arithmetic)
    assert exact == [[127, 64]] and kernel == [[127, 64]]
    x = torch.tensor([[1.001, 0.5]])
    assert PerToken(torch.bfloat16).quantize(x, Arithmetic.KERNEL)[1] == torch.tensor(1.0) / 127


def msd_by_loops(q: Tensor, scale: Tensor, bias: Tensor, x8: Tensor, x_scale: float) -> list[float]:
    """The A8W4 kernel for one row, number by number; q [n, k], scale float32 [n, G] already cut to 19 bits."""
    group_size, results = q.shape[1] // scale.shape[1], []
    for n in range(len(q)):
        high_sum = low_sum = torch.tensor(0.0, dtype=torch.float16)
        for group in range(scale.shape[1]):
            span = range(group * group_size, (group + 1) * group_size)
            high = sum(math.floor(int(x8[k]) / 16) * int(q[n, k]) for k in span)
            low = sum((int(x8[k]) % 16 - 8) * int(q[n, k]) for k in span)
            high_sum = high_sum + (torch.tensor(float(high)) * scale[n, group]).half()
            low_sum = low_sum + (torch.tensor(float(low)) * scale[n, group]).half()
        y = (high_sum.float() * 16 + low_sum.float() + bias[n]) * torch.tensor(x_scale)
        results.append(float(y))
    return results


@pytest.mark.parametrize("group", [0, 4])
def test_the_kernel_rounds_partial_sums_to_float16_and_adds_them_there(group: int) -> None:
    draft = Draft(seed=group)
    draft.expert("m", 8, 12, group, 1)
    scales = TwoLevel(draft.tensors["m.weight_scale"].squeeze(1) * 200, draft.tensors.get("m.weight_scale_second"))
    bias = draft.tensors["m.scale_bias"] * 200
    shard = PackedShard(pack_layout(draft.tensors["m.weight"], scales, bias), slice(0, 8))
    x8 = draft.integers(-127, 127, 3, 12).to(torch.int8)
    sums = shard.kernel(x8, torch.tensor([[0.5], [0.01], [3.0]]))
    q = draft.truths["m"].codes // scales.steps().repeat_interleave(12 // scales.steps().shape[1], 1)
    for row, x_scale in enumerate((0.5, 0.01, 3.0)):
        expected = msd_by_loops(q, truncate_fp19(scales.combined()), bias.squeeze(1), x8[row], x_scale)
        assert sums[row].tolist() == expected
