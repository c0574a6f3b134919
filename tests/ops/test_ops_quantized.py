"""Integer operators with ==; the float ones around them in float32, rounding by rounding."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from fxquant import ops
from fxquant.ops.quantized import decode_deq_scale, expand_int4


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def exact_product(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float64, exact below 2**53."""
    return x.double() @ weight.double().T


# static quantization


def test_quantize_static_rounds_half_to_even_and_clamps() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 126.5, 127.5, 300.0, -128.5, -129.0, -1e30, 1e30])
    result = ops.quantize_static(x, torch.tensor([1.0]), torch.tensor([0.0]))
    assert result.tolist() == [0, 2, 2, 0, -2, 126, 127, 127, -128, -128, -128, 127]
    assert result.dtype == torch.int8


@given(
    arrays.arrays(np.float32, st.integers(1, 20), elements=st.floats(-1e4, 1e4, width=32)),
    st.floats(0.0078125, 1e3, width=16),
    st.integers(-128, 127),
)
def test_quantize_static_is_its_formula(x: np.ndarray, scale: float, offset: int) -> None:
    expected = [min(max(round(float(v / np.float32(scale) + np.float32(offset))), -128), 127) for v in x]
    parameters = torch.tensor([scale]).half(), torch.tensor([float(offset)]).half()
    assert ops.quantize_static(torch.from_numpy(x), *parameters).tolist() == expected


# quantization per token


@given(arrays.arrays(np.float32, (3, 7), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_quantize_per_token_properties(x: np.ndarray) -> None:
    integers_, scales = ops.quantize_per_token(torch.from_numpy(x))
    assert integers_.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (3, 1)
    for row, q, scale in zip(x, integers_.tolist(), scales[:, 0].numpy(), strict=True):
        maximum = np.abs(row).max()
        assert scale == maximum / np.float32(127)
        assert max(map(abs, q)) <= 127
        if maximum >= np.float32(1e-30):
            assert q == [round(float(value * (np.float32(127) / maximum))) for value in row]
            assert abs(q[int(np.abs(row).argmax())]) == 127


@pytest.mark.parametrize("maximum", [0.0, 1e-45, 1e-38, 9e-31], ids=["zeros", "subnormal", "tiny", "just below"])
def test_quantize_per_token_takes_tiny_rows_for_zeros(maximum: float) -> None:
    x = torch.tensor([[maximum, -maximum, 0.0]])
    q, scale = ops.quantize_per_token(x)
    assert q.tolist() == [[0, 0, 0]]
    assert torch.equal(scale, x.abs().amax(-1, keepdim=True) / 127)


def test_quantize_per_token_rounds_half_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = ops.quantize_per_token(x)
    assert (q.tolist(), scale.tolist()) == ([[127, 0, 2, 2, 0, -2]], [[1.0]])


def test_quantize_per_token_of_bfloat16_is_that_of_its_float32() -> None:
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    for narrow, wide in zip(ops.quantize_per_token(x), ops.quantize_per_token(x.float()), strict=True):
        assert torch.equal(narrow, wide)


def test_dequantized_tokens_are_half_a_step_from_the_input() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    q, scale = ops.quantize_per_token(x)
    # rounding moves by half a step of scale; the float32 arithmetic around it adds a few 2**-24 of the largest value
    assert ((q * scale - x).abs() <= scale * (0.5 + 127 * 4 * 2.0**-24)).all()


# integer matmul


@pytest.mark.parametrize("k", [1, 7, 256, 7168])
@pytest.mark.parametrize(("left", "right"), [(127, 127), (-128, -128), (-128, 127), (127, -127)])
def test_int_matmul_at_the_extremes(k: int, left: int, right: int) -> None:
    x, weight = torch.full((3, k), left, dtype=torch.int8), torch.full((5, k), right, dtype=torch.int8)
    assert ops.int_matmul(x, weight).tolist() == [[left * right * k] * 5] * 3


@pytest.mark.parametrize(("m", "n", "k"), [(0, 4, 8), (1, 1, 1), (1, 3, 7), (17, 33, 65), (3, 16, 7168)])
def test_int_matmul_of_random_integers(m: int, n: int, k: int) -> None:
    x, weight = integers(-128, 127, m, k), integers(-128, 127, n, k, seed=1)
    result = ops.int_matmul(x, weight)
    assert result.dtype == torch.int32
    assert torch.equal(result.double(), exact_product(x, weight))


def test_int_matmul_of_expanded_operands() -> None:
    """Strides of zero, which torch._int_mm answers with uninitialized memory."""
    x, weight = integers(-128, 127, 3, 64), integers(-128, 127, 5, 64, seed=1)
    row, column = x[:1].expand(3, 64), x[:, :1].expand(3, 64)
    assert torch.equal(ops.int_matmul(row, weight).double(), exact_product(row, weight))
    assert torch.equal(ops.int_matmul(column, weight).double(), exact_product(column, weight))
    assert torch.equal(ops.int_matmul(x, column).double(), exact_product(x, column))


def test_int_matmul_up_to_its_documented_width() -> None:
    x = torch.full((1, 131_000), -128, dtype=torch.int8)
    assert ops.int_matmul(x, x).tolist() == [[131_000 * 128 * 128]]


def test_int_matmul_takes_any_leading_dimensions_and_strides() -> None:
    x, weight = integers(-128, 127, 3, 2, 8).transpose(0, 1), integers(-128, 127, 8, 5, seed=1).T
    assert torch.equal(ops.int_matmul(x, weight).double(), exact_product(x, weight))


# packed int4


def pack(q4: np.ndarray) -> Tensor:
    """int4 [n, k] → int8 [n / 2, k], row 2i in the low nibble."""
    low, high = q4[0::2].astype(np.uint8) & 0xF, q4[1::2].astype(np.uint8) & 0xF
    return torch.from_numpy((low | high << 4).view(np.int8))


def test_expand_int4_reads_the_low_nibble_first() -> None:
    packed = torch.tensor([[-31]], dtype=torch.int8)  # 0xE1: low nibble 1, high nibble -2
    assert expand_int4(packed, None).tolist() == [[1], [-2]]


def test_expand_int4_of_every_byte() -> None:
    q4 = np.array([list(range(-8, 8)) * 16, [high for high in range(-8, 8) for _ in range(16)]])
    assert expand_int4(pack(q4), None).tolist() == q4.tolist()


@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_expand_int4_multiplies_by_integer_group_scales(
    data: st.DataObject, pairs: int, groups: int, size: int
) -> None:
    q4 = data.draw(arrays.arrays(np.int8, (2 * pairs, groups * size), elements=st.integers(-7, 7)))
    scales = data.draw(arrays.arrays(np.float32, (2 * pairs, groups), elements=st.integers(1, 18).map(float)))
    expanded = expand_int4(pack(q4), torch.from_numpy(scales))
    assert expanded.dtype == torch.int8
    assert expanded.tolist() == (q4 * scales.repeat(size, 1)).astype(int).tolist()


@pytest.mark.parametrize(("q4", "scale"), [(7, 18), (-7, 18), (1, 127), (-1, 127), (-8, 15)])
def test_int4_matmul_at_the_extremes(q4: int, scale: int) -> None:
    packed = pack(np.full((4, 7168), q4, dtype=np.int8))
    x = torch.tensor([[127] * 7168, [-128] * 7168], dtype=torch.int8)
    product = ops.int4_matmul(x, packed, torch.full((4, 28), float(scale)))
    assert product.tolist() == [[127 * q4 * scale * 7168] * 4, [-128 * q4 * scale * 7168] * 4]


def test_int4_matmul_without_group_scales() -> None:
    q4 = integers(-8, 7, 6, 64).numpy()
    x = integers(-128, 127, 2, 3, 64, seed=1)
    assert torch.equal(ops.int4_matmul(x, pack(q4)).double(), exact_product(x, torch.from_numpy(q4)))


# dequantization


def test_dequantize_static_adds_the_integer_bias_first() -> None:
    acc, bias = torch.tensor([[2**24 + 1, -5, 7]], dtype=torch.int32), torch.tensor([1, 5, -8], dtype=torch.int32)
    scale = torch.tensor([0.5, 3.0, 0.1])
    expected = (acc.numpy() + bias.numpy()).astype(np.float32) * scale.numpy()
    assert ops.dequantize_static(acc, scale, bias).tolist() == expected.tolist()


def test_dequantize_static_reads_scales_stored_as_int64() -> None:
    scale = torch.tensor([0.5, 3.0, 1e-20, 65504.0])
    stored = torch.from_numpy(scale.numpy().view(np.uint32).astype(np.int64))
    assert torch.equal(decode_deq_scale(stored), scale)
    acc, bias = torch.arange(8, dtype=torch.int32).view(2, 4), torch.zeros(4, dtype=torch.int32)
    assert torch.equal(ops.dequantize_static(acc, stored, bias), ops.dequantize_static(acc, scale, bias))


@pytest.mark.parametrize("biased", [False, True])
def test_dequantize_per_token_is_its_formula(biased: bool) -> None:
    generator = np.random.default_rng(0)
    acc = generator.integers(-(2**31), 2**31, (2, 3, 5)).astype(np.int32)
    x_scale, weight_scale = generator.random((2, 3, 1), np.float32), generator.random((5, 1), np.float32)
    bias = torch.from_numpy(generator.random(5, np.float32)).bfloat16() if biased else None
    expected = acc.astype(np.float32) * weight_scale[:, 0] * x_scale + (bias.float().numpy() if biased else 0)
    result = ops.dequantize_per_token(*map(torch.from_numpy, (acc, x_scale, weight_scale)), bias)
    assert result.tolist() == expected.tolist()


# grouped by expert

COUNTS = {"empty experts": [0, 3, 0, 2], "one expert": [0, 0, 5, 0], "no rows": [0, 0, 0, 0]}


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_matmuls_are_those_of_each_expert(counts: list[int]) -> None:
    rows = sum(counts)
    x, weight = integers(-128, 127, rows, 16), integers(-128, 127, 4, 6, 16, seed=1)
    second = torch.randint(1, 16, (4, 12, 2), generator=torch.Generator().manual_seed(2)).float()
    grouped = ops.grouped_int_matmul(x, weight, torch.tensor(counts))
    packed = ops.grouped_int4_matmul(x, weight, torch.tensor(counts), second)
    plain = ops.grouped_int4_matmul(x, weight, torch.tensor(counts))
    assert (grouped.shape, packed.shape, plain.shape) == ((rows, 6), (rows, 12), (rows, 12))
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(owners):
        token = x[row : row + 1]
        assert torch.equal(grouped[row : row + 1].double(), exact_product(token, weight[expert]))
        expanded = expand_int4(weight[expert], second[expert])
        assert torch.equal(packed[row : row + 1].double(), exact_product(token, expanded))
        assert torch.equal(plain[row : row + 1].double(), exact_product(token, expand_int4(weight[expert], None)))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS.keys())
def test_grouped_dequantize_takes_each_experts_scales(counts: list[int]) -> None:
    rows = sum(counts)
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-(2**20), 2**20, (rows, 6), generator=generator, dtype=torch.int32)
    x_scale, weight_scale = torch.rand(rows, 1, generator=generator), torch.rand(4, 6, 1, generator=generator)
    result = ops.grouped_dequantize(acc, x_scale, weight_scale, torch.tensor(counts))
    assert (result.shape, result.dtype) == ((rows, 6), torch.float32)
    owners = [expert for expert, count in enumerate(counts) for _ in range(count)]
    for row, expert in enumerate(owners):
        expected = acc[row].numpy().astype(np.float32) * weight_scale[expert, :, 0].numpy() * x_scale[row].numpy()
        assert result[row].tolist() == expected.tolist()


def test_grouped_references_take_experts_one_by_one() -> None:
    """Sequences in place of stacks, for weights that are not in memory at once."""
    counts, x = torch.tensor([2, 0, 1]), integers(-128, 127, 3, 16)
    weight, second = integers(-128, 127, 3, 6, 16, seed=1), torch.ones(3, 12, 2)
    acc, scales = torch.ones(3, 6, dtype=torch.int32), torch.rand(3, 6, 1)
    calls = [
        (ops.grouped_int_matmul, (x,), (weight,), (counts,)),
        (ops.grouped_int4_matmul, (x,), (weight,), (counts, second)),
        (ops.grouped_dequantize, (acc, torch.ones(3, 1)), (scales,), (counts,)),
    ]
    for operator, before, (stack,), after in calls:
        unread = [stack[0], None, stack[2]]  # expert 1 has no rows and is not read
        assert torch.equal(ops.REFERENCES[operator](*before, unread, *after), operator(*before, stack, *after))
