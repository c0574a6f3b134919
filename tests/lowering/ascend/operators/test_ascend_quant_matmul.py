"""torch.ops.npu on CPU: the integer matmul against plain loops and the fxq:: operators."""

import re

import pytest
import torch
from ascend_calls import floats, generator, int8, integer_product, low_words, npu

from fxquant import ops
from fxquant.lowering.ascend.operators.quantize import truncate_to_19_bits


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
