"""torch.ops.npu on CPU: each operator against plain loops, then against the fxq:: operator of the same formula."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fxquant import ops
from fxquant.lowering.ascend.operators import KERNELS, register
from fxquant.lowering.ascend.operators.arguments import dtype_of
from fxquant.lowering.ascend.operators.grouped_matmul import split_nibbles, unpack_int4
from fxquant.lowering.ascend.operators.quantize import truncate_to_19_bits
from fxquant.lowering.ascend.operators.schemas import SCHEMAS

register()
npu = torch.ops.npu

UNIT = 2.0**-24
"""Half a step of float32 at 1: one rounding moves a value by at most this fraction."""


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def floats(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def int8(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(-128, 128, shape, generator=generator(seed), dtype=torch.int8)


def integer_product(x: Tensor, weight: Tensor) -> list[list[int]]:
    """x [m, k] @ weight [k, n] in Python integers."""
    columns = list(zip(*weight.tolist(), strict=True))
    return [[sum(a * b for a, b in zip(row, column, strict=True)) for column in columns] for row in x.tolist()]


def low_words(scale: Tensor) -> Tensor:
    """float32 → int64 with its bits in the low word."""
    return scale.view(torch.int32).long() & 0xFFFFFFFF


def pack_int4(codes: Tensor) -> Tensor:
    """int8 [..., n] in [-8, 7] → int32 [..., n / 8], lowest n in the lowest bits."""
    words = [
        sum((code & 0xF) << 4 * place for place, code in enumerate(eight)) for eight in codes.reshape(-1, 8).tolist()
    ]
    signed = [word - (1 << 32) if word >> 31 else word for word in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(*codes.shape[:-1], -1)


# registration


def test_every_operator_has_its_pinned_schema():
    assert KERNELS.keys() == SCHEMAS.keys()
    for name, schema in SCHEMAS.items():
        defined, pinned = getattr(npu, name).default._schema, torch._C.parse_schema("npu::" + schema)
        assert defined == pinned


def test_register_twice_defines_once():
    before = npu.npu_swiglu.default
    register()
    assert npu.npu_swiglu.default is before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes_pass_through_integer_parameters(dtype: torch.dtype):
    x, weight = int8(2, 3), int8(3, 4)
    assert npu.npu_quant_matmul(x, weight, torch.ones(4), output_dtype=dtype).dtype == dtype


def test_an_unknown_dtype_is_named():
    with pytest.raises(ValueError, match=re.escape("npu_x: dtype is torch.int8; the CPU reference takes torch.qint8")):
        dtype_of(1, "npu_x: dtype", (torch.qint8,))
    with pytest.raises(ValueError, match=re.escape("npu_x: dtype is 999")):
        dtype_of(999, "npu_x: dtype", (torch.qint8,))


def test_arguments_that_no_kernel_takes_are_errors_unless_default():
    x = floats(2, 4)
    npu.npu_dynamic_quant(x, group_index=None, dst_type_max=0.0)
    with pytest.raises(ValueError, match="npu_dynamic_quant: group_index is not supported"):
        npu.npu_dynamic_quant(x, group_index=torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match="npu_moe_token_unpermute: padded_mode is not supported"):
        npu.npu_moe_token_unpermute(x, torch.arange(2), None, True)
    with pytest.raises(ValueError, match="npu_moe_token_unpermute: restore_shape is not supported"):
        npu.npu_moe_token_unpermute(x, torch.arange(2), restore_shape=[2, 4])


# quantize


@given(st.lists(st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
@settings(deadline=None)
def test_dynamic_quant(rows: list[list[float]]):
    x = torch.tensor(rows)
    quantized, scale = npu.npu_dynamic_quant(x)
    assert quantized.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(rows),)
    for row, integers, step in zip(x, quantized, scale, strict=True):
        top = max(abs(value) for value in row.tolist())
        factor = torch.tensor(127.0) / torch.tensor(max(top, 1e-30))
        assert step == torch.tensor(top) / 127
        # Python's round is half to even, as rne.
        assert integers.tolist() == [round(float(value * factor)) for value in row]
        assert int(integers.abs().max()) == 127 or top < 1e-30


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
    with pytest.raises(ValueError, match=re.escape("scales (3,) does not go along axis -1")):
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


# integer matmul


def test_quant_matmul_with_integer_bias():
    x, weight, scale = int8(3, 5), int8(5, 4, seed=1), floats(4).abs()
    bias = torch.randint(-(10**6), 10**6, (4,), generator=generator(), dtype=torch.int32)
    result = npu.npu_quant_matmul(x, weight, scale, bias=bias, output_dtype=torch.float32)
    # 5 * 128 * 128 + 10^6 < 2^24, so the sum is exact in float32 and the only rounding is that of the product.
    for row, sums in enumerate(integer_product(x, weight)):
        for column, value in enumerate(sums):
            assert result[row, column] == torch.tensor(float(value + int(bias[column]))) * scale[column]
    assert torch.equal(result, ops.dequantize_static(ops.int_matmul(x, weight.T), scale, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quant_matmul_per_token_with_float_bias(dtype: torch.dtype):
    x, weight, scale, bias = int8(3, 5), int8(5, 4, seed=1), floats(4).abs() / 99, floats(4, seed=2)
    x_scale = floats(3).abs()
    result = npu.npu_quant_matmul(x, weight, scale, pertoken_scale=x_scale, bias=bias, output_dtype=dtype)
    for row, sums in enumerate(integer_product(x, weight)):
        for column, value in enumerate(sums):
            expected = torch.tensor(float(value)) * scale[column] * x_scale[row] + bias[column]
            assert result[row, column] == expected.to(dtype)
    acc = ops.int_matmul(x, weight.T)
    assert torch.equal(result, ops.dequantize_per_token(acc, x_scale[:, None], scale[:, None], bias).to(dtype))


def test_quant_matmul_takes_any_leading_dimensions_and_one_scale():
    x, weight, x_scale = int8(2, 3, 5), int8(5, 4, seed=1), floats(3).abs()
    result = npu.npu_quant_matmul(
        x, weight, torch.tensor([0.5]), pertoken_scale=x_scale, bias=torch.ones(4), output_dtype=torch.float32
    )
    for batch in range(2):
        for row, sums in enumerate(integer_product(x[batch], weight)):
            assert torch.equal(result[batch, row], torch.tensor(sums) * 0.5 * x_scale[row] + 1)


def test_quant_matmul_reads_the_low_word_of_an_int64_scale():
    x, weight, scale = int8(3, 5), int8(5, 4, seed=1), floats(4).abs() / 1000
    full = npu.npu_quant_matmul(x, weight, scale, output_dtype=torch.float16)
    assert torch.equal(npu.npu_quant_matmul(x, weight, low_words(scale), output_dtype=torch.float16), full)
    encoded = npu.npu_trans_quant_param(scale)
    as_device = npu.npu_quant_matmul(x, weight, encoded, output_dtype=torch.float32)
    exact = npu.npu_quant_matmul(x, weight, truncate_to_19_bits(scale), output_dtype=torch.float32)
    assert torch.equal(as_device, exact)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"output_dtype": None}, "output_dtype is None"),
        ({"output_dtype": torch.int8}, "output_dtype is torch.int8"),
        ({"x2": torch.ones(5, 4)}, "x2 is torch.float32"),
        ({"scale": torch.ones(3)}, "scale (3,) is neither [1] nor [4]"),
        ({"scale": torch.ones(4, dtype=torch.float16)}, "scale is torch.float16"),
        ({"bias": torch.ones(4, dtype=torch.int64)}, "bias is torch.int64"),
        ({"bias": torch.ones(1)}, "bias (1,) is not [4]"),
        ({"pertoken_scale": torch.ones(1)}, "pertoken_scale torch.float32 (1,) is not float32 [3]"),
        ({"scale": low_words(torch.ones(4)), "pertoken_scale": torch.ones(3)}, "scale is int64, which does not go"),
        ({"scale": low_words(torch.ones(4)), "output_dtype": torch.bfloat16}, "scale is int64, which goes with"),
        ({"scale": torch.tensor([1 << 40 | 1])}, "scale carries an offset"),
        ({"offset": torch.ones(1)}, "offset is not supported"),
        ({"group_sizes": [0, 0, 32]}, "group_sizes is not supported"),
    ],
)
def test_quant_matmul_names_what_it_does_not_take(arguments: dict, message: str):
    call = {"x1": int8(3, 5), "x2": int8(5, 4), "scale": torch.ones(4), "output_dtype": torch.float32}
    with pytest.raises(ValueError, match=re.escape(f"npu_quant_matmul: {message}")):
        npu.npu_quant_matmul(**call | arguments)


# grouped matmul

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


# norm and activation


def test_rms_norm():
    x, gamma = floats(2, 3, 5), floats(5, seed=1)
    result, rstd = npu.npu_rms_norm(x, gamma, 1e-5)
    assert rstd.shape == (2, 3, 1)
    for index in itertools.product(range(2), range(3)):
        row = x[index].tolist()
        factor = 1 / math.sqrt(sum(value * value for value in row) / 5 + 1e-5)
        # Squares, their sum of 5, mean, + epsilon: 8 roundings under a root, then rsqrt (2 units) and two products.
        assert float(rstd[index]) == pytest.approx(factor, rel=7 * UNIT)
        for column, value in enumerate(row):
            assert float(result[*index, column]) == pytest.approx(value * factor * float(gamma[column]), rel=9 * UNIT)
    assert torch.equal(result, ops.rms_norm(x, gamma, 1e-5))
    with pytest.raises(ValueError, match="npu_rms_norm: gamma is torch.float32, the input torch.bfloat16"):
        npu.npu_rms_norm(x.bfloat16(), gamma)


@pytest.mark.parametrize("width", [3, 37, 64])
def test_swiglu(width: int):
    x = floats(5, 2 * width) * 4
    result = npu.npu_swiglu(x)
    for row, column in itertools.product(range(5), range(width)):
        gate, up = float(x[row, column]), float(x[row, width + column])
        # exp, 1 +, division and product round once each; exp is within 2 units.
        assert float(result[row, column]) == pytest.approx(gate / (1 + math.exp(-gate)) * up, rel=6 * UNIT)
    gate, up = (half.contiguous() for half in x.chunk(2, -1))
    assert torch.equal(result, ops.swiglu(gate, up))
    # In another memory layout the same formula runs in scalar code, whose exp is another one.
    torch.testing.assert_close(npu.npu_swiglu(x.T.contiguous(), 0).T, result, rtol=12 * UNIT, atol=0)
    assert torch.equal(npu.npu_swiglu(x.bfloat16()), npu.npu_swiglu(x.bfloat16().float()).bfloat16())
    with pytest.raises(ValueError, match="npu_swiglu: dim -1 of size 3 has no halves"):
        npu.npu_swiglu(floats(2, 3))


# attention


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
        ({"block_table": torch.zeros(2, 1, dtype=torch.int32)}, "block_table is not supported"),
    ],
)
def test_attention_names_what_it_does_not_take(arguments: dict, message: str):
    call = attention_inputs() | {"num_heads": 2, "input_layout": "BSND"}
    npu.npu_fused_infer_attention_score(**call)
    with pytest.raises(ValueError, match=re.escape(f"npu_fused_infer_attention_score: {message}")):
        npu.npu_fused_infer_attention_score(**call | arguments)


# experts

GATE = {"k_group": 2, "group_count": 4, "group_select_mode": 1, "norm_type": 1, "out_flag": True}


def slow_gate(scores: list[float], bias: list[float], k: int) -> list[int]:
    """Four groups, the best two by their two best experts, then the k best; float32 sums as Python sees them."""
    choice = [float(torch.tensor(score) + torch.tensor(extra)) for score, extra in zip(scores, bias, strict=True)]
    size = len(choice) // 4
    groups = [sorted(choice[group * size : (group + 1) * size])[-2:] for group in range(4)]
    sums = [float(torch.tensor(one) + torch.tensor(other)) for one, other in groups]
    kept = sorted(range(4), key=lambda group: (-sums[group], group))[:2]
    experts = [expert for expert in range(len(choice)) if expert // size in kept]
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
