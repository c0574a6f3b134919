"""torch.ops.npu on CPU: quantization against plain loops and the fxq:: operators."""

import itertools
import re

import pytest
import torch
from ascend_calls import floats, low_words, npu
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant import ops
from fxquant.lowering.ascend.operators.quantize import truncate_to_19_bits
from fxquant.ops.quantized import SMALLEST_ROW_MAXIMUM


@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None)
def test_dynamic_quant(rows: list[list[float]]):
    x = torch.tensor(rows)
    quantized, scale = npu.npu_dynamic_quant(x)
    assert quantized.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(rows),)
    for row, integers, step in zip(x, quantized, scale, strict=True):
        top = max(abs(value) for value in row.tolist())
        # below the smallest maximum a row counts as zeros
        factor = torch.tensor(0.0 if top < SMALLEST_ROW_MAXIMUM else 127.0) / torch.tensor(max(top, 1e-30))
        assert step == torch.tensor(top) / 127
        # Python's round is half to even, as rne.
        assert integers.tolist() == [round(float(value * factor)) for value in row]
        assert int(integers.abs().max()) == 127 or top < SMALLEST_ROW_MAXIMUM


def test_dynamic_quant_smooths_first_and_keeps_leading_dimensions():
    x, smooth = floats(2, 3, 4), torch.tensor([1.0, 2.0, 0.5, 4.0])
    quantized, scale = npu.npu_dynamic_quant(x.bfloat16(), smooth_scales=smooth.bfloat16(), dst_type=torch.int8)
    expected, expected_scale = ops.quantize_per_token(x.bfloat16().float() * smooth)
    assert torch.equal(quantized, expected)
    assert torch.equal(scale.unsqueeze(-1), expected_scale)


@pytest.mark.parametrize("div_mode", [True, False])
@pytest.mark.parametrize("zero", [None, -128, 25])
def test_quantize(div_mode: bool, zero: int | None):
    x = torch.tensor([[0.5, 1.5, 2.5, -7.5], [126.6, -128.4, 300.0, -300.0]])
    scales = torch.tensor([1.0, 0.5, 2.0, 1.0])
    zeros = None if zero is None else torch.full((4,), float(zero))
    result = npu.npu_quantize(x, scales, zeros, torch.qint8, -1, div_mode)
    for row, column in itertools.product(range(2), range(4)):
        scaled = float(x[row, column] / scales[column] if div_mode else x[row, column] * scales[column])
        assert result[row, column] == min(127, max(-128, round(scaled + (zero or 0))))


@pytest.mark.parametrize(
    ("low", "high", "scale", "offset"),
    [(-3.0, 2.0, 5 / 255, 25), (1.0, 2.0, 2 / 255, -128), (-4.0, -1.0, 4 / 255, 127), (0.0, 0.0, 2.0**-23, -128)],
)
def test_quantize_with_the_range_of_an_activation(low: float, high: float, scale: float, offset: int):
    """The ends of [min(low, 0), max(high, 0)] map to -128 and 127, zero to the offset."""
    x = torch.tensor([[min(low, 0.0), 0.0, max(high, 0.0)]])
    expected = [-128, offset, 127] if high > low else [offset] * 3
    result = npu.npu_quantize(x, torch.tensor([scale]), torch.tensor([float(offset)]), torch.qint8, -1)
    assert result.tolist() == [expected]
    assert torch.equal(result, ops.quantize_static(x, torch.tensor([scale]), torch.tensor([float(offset)])))


def test_quantize_goes_along_the_axis():
    x, scales = floats(2, 3, 4) * 50, torch.tensor([1.0, 2.0, 4.0])
    for axis, div_mode in ((1, True), (-2, False)):
        result = npu.npu_quantize(x, scales, None, torch.qint8, axis, div_mode)
        for index in range(3):
            plane = x[:, index] / scales[index] if div_mode else x[:, index] * scales[index]
            assert torch.equal(result[:, index], plane.round().clamp(-128, 127).to(torch.int8))
    # Without div_mode any axis but -2 is the last one.
    last = npu.npu_quantize(x, torch.ones(4), None, torch.qint8, 1, False)
    assert torch.equal(last, npu.npu_quantize(x, torch.ones(4), None, torch.qint8, -1, False))
    with pytest.raises(ValueError, match=re.escape("scales (3,) does not fit axis -1")):
        npu.npu_quantize(x, scales, None, torch.qint8, 1, False)
    with pytest.raises(ValueError, match="npu_quantize: dtype is torch.int32"):
        npu.npu_quantize(x, scales, None, torch.int32)


def test_trans_quant_param():
    encode = npu.npu_trans_quant_param
    assert encode(torch.tensor([0.0123])).tolist() == [70369755627520]
    assert low_words(torch.tensor([0.0123, 1.0])).tolist() == [1011451376, 1065353216]
    assert low_words(truncate_to_19_bits(torch.tensor([0.0123]))).tolist() == [1011449856]
    # 1 + 2^-11 is half a step above 1, and 1 + 3 * 2^-11 half a step above the odd 1 + 2^-10.
    scale = torch.tensor([1 + 2.0**-11, 1 + 3 * 2.0**-11, 2 - 2.0**-23])
    decoded = [(value & 0xFFFFFFFF) for value in encode(scale, None, 1).tolist()]
    assert decoded == low_words(torch.tensor([1.0, 1 + 2 * 2.0**-10, 2.0])).tolist()
    offset = torch.tensor([-3.0, 2.5, -1000.0])
    fields = [(value >> 37) & 0x1FF for value in encode(scale, offset).tolist()]
    assert fields == [512 - 3, 2, 512 - 256]
    assert encode(scale[:1], torch.tensor([1000.0])).item() >> 37 & 0x1FF == 255
