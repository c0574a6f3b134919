"""The kernels against published vectors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_loops import EPS, codes_of, recipe_of, same, unpack
from torch import Tensor

from fxquant import ops
from fxquant.kernels import pack_int4 as kernels
from fxquant.kernels.activation import encode_deq_scale, static_parameters
from fxquant.kernels.module_tensors import make_tensors
from fxquant.lowering.ascend.operators.grouped_matmul import split_nibbles
from fxquant.lowering.ascend.operators.quantize import npu_trans_quant_param
from fxquant.schemes.schemes import ActivationRange, Scheme
from fxquant.schemes.weight_formats import WeightFormat

# published vectors


def test_t1_packing() -> None:
    q4 = torch.tensor([[1], [-2]], dtype=torch.int8)
    assert kernels.pack_int4(q4).tolist() == [[-31]]
    assert kernels.pack_int4(q4).dtype is torch.int8


SECONDS = {0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 10: 1, 11: 2, 18: 3, 24: 3, 25: 4, 31: 4, 32: 5, 52: 7, 53: 8, 60: 9}
SECONDS |= {100: 14, 118: 17, 119: 17}


@pytest.mark.parametrize("sign", [1, -1])
def test_t2_second_scale(sign: int) -> None:
    """A first group that reaches 119 makes the row scale 1, so that the second holds the maxima of the table."""
    weight = torch.tensor([[119.0, 0.0, sign * float(maximum), 0.0] for maximum in SECONDS])
    _, scale, second = codes_of(weight, Scheme.W4A8_DYNAMIC, 2)
    assert scale.flatten().tolist() == [1.0] * len(SECONDS)
    assert second.tolist() == [[17.0, float(expected)] for expected in SECONDS.values()]


def test_t3_saturation() -> None:
    weight = torch.tensor([[119.0, 0, 0, 0, 10, -5, 3, -10]])
    q4, _, second = codes_of(weight, Scheme.W4A8_DYNAMIC, 4)
    assert second.tolist() == [[17, 1]]
    assert q4[0, 4:].tolist() == [7, -5, 3, -8]


def test_t4_rounding() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -7.5, 126.6]])
    q, scale, _ = codes_of(weight, Scheme.W8A8_DYNAMIC)
    assert (q.tolist(), scale.tolist()) == ([[127, 0, 2, 2, -8, 127]], [[1.0]])
    # a weight never exceeds its own scale, an activation does
    assert ops.quantize_static(torch.tensor([-128.4]), torch.ones(1), torch.zeros(1)).tolist() == [-128]


@pytest.mark.parametrize(
    ("low", "high", "scale", "offset"),
    [(-3, 2, 5 / 255, 25), (1, 2, 2 / 255, -128), (-4, -1, 4 / 255, 127), (0, 0, EPS, -128)],
)
def test_t5_static_parameters(low: float, high: float, scale: float, offset: float) -> None:
    parameters = static_parameters(ActivationRange(low, high))
    assert [value.dtype for value in parameters] == [torch.float32] * 2
    assert [value.item() for value in parameters] == [np.float32(scale), offset]


T6 = {-128: (-8, -8), -17: (-2, 7), -16: (-1, -8), -1: (-1, 7), 0: (0, -8), 7: (0, -1), 8: (0, 0), 127: (7, 7)}


def test_t6_an_int8_is_two_signed_nibbles() -> None:
    x = torch.arange(-128, 128).to(torch.int8)
    high, low = split_nibbles(x)
    assert torch.equal(16 * high.int() + low.int() + 8, x.int())
    assert all(-8 <= nibble <= 7 for part in (high, low) for nibble in part.tolist())
    assert {code: (high[code + 128].item(), low[code + 128].item()) for code in T6} == T6


def test_t7_what_the_device_makes_of_a_scale() -> None:
    encoded = npu_trans_quant_param(torch.tensor([0.0123])).item()
    assert (encoded, encoded & 0xFFFFFFFF) == (70369755627520, 1011449856)


def test_t7_deq_scale_of_float16_models() -> None:
    deq_scale = torch.tensor([1.0, 0.0123])
    encoded = encode_deq_scale(deq_scale, torch.float16)
    assert encoded.tolist() == [1065353216, 1011451376] and encoded.dtype is torch.int64
    assert encode_deq_scale(-deq_scale, torch.float16).tolist() == [1065353216 - 2**31, 1011451376 - 2**31]
    for dtype in (torch.bfloat16, torch.float32):
        assert same(encode_deq_scale(deq_scale, dtype), deq_scale)


T8_BYTES = [
    153, 217, 10, 58, 123, 155, 220, 12, 61, 125, 157, 222, 14, 63, 127, 144, 208, 0, 49, 113, 146, 210, 3, 51, 116,
    148, 213, 5, 54, 118, 150, 215,
]  # fmt: skip
T8_ROW_0 = [
    -7, -7, -6, -6, -5, -5, -4, -4, -3, -3, -3, -2, -2, -1, -1, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6, 7,
]  # fmt: skip
T8_CHUNKS = [
    -256.59375, -219.9375, -183.28125, -146.625, -109.96875, -91.640625, -54.984375, -18.328125, 0, 34.5, 69, 103.5,
    138, 172.5, 207, 224.25,
]  # fmt: skip


def t8_weight() -> Tensor:
    return torch.tensor([[k - 16.0 for k in range(32)], [k % 5 - 2.0 for k in range(32)]])


def test_t8_small_two_level() -> None:
    weight = t8_weight()
    tensors = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    assert tensors["weight_scale"].flatten().tolist() == [np.float32(peak) / np.float32(119) for peak in (16, 2)]
    assert tensors["weight_scale_second"].tolist() == [[17, 16], [17, 17]]
    assert tensors["weight"].tolist() == [[byte - 256 if byte > 127 else byte for byte in T8_BYTES]]
    assert unpack(tensors["weight"]) == [T8_ROW_0, ([-7, -3, 0, 3, 7] * 7)[:32]]
    assert tensors["scale_bias"].tolist() == [[-132.609375], [-22.91015625]]
    row_parallel = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16, row_parallel=True), "w", weight)
    assert row_parallel["scale_bias"][0].tolist() == T8_CHUNKS
    assert row_parallel["scale_bias"].sum(1).tolist() == [-132.609375, -22.91015625]


def test_t9_scale_bias_completes_the_split_activation() -> None:
    """16 hi + lo + 8 is the activation: two products on nibbles plus scale_bias are the product on x."""
    weight = t8_weight()
    tensors = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    scale = tensors["weight_scale"].bfloat16().double()
    d = (
        torch.tensor(unpack(tensors["weight"])).double()
        * tensors["weight_scale_second"].repeat_interleave(16, 1)
        * scale
    )
    x = torch.arange(-128, 128)[torch.randperm(256, generator=torch.Generator().manual_seed(0))].view(8, 32)
    hi, lo = (x / 16).floor(), x % 16 - 8
    assert torch.equal(16 * (hi.double() @ d.T) + lo.double() @ d.T + tensors["scale_bias"].flatten(), x.double() @ d.T)


def test_t10_zero_row() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 0] = 119.0
    tensors = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    assert tensors["weight_scale"].tolist() == [[0], [1]]
    assert tensors["weight_scale_second"].tolist() == [[1, 1], [17, 1]]
    assert unpack(tensors["weight"]) == [[0] * 32, [7] + [0] * 31]
    assert tensors["scale_bias"].tolist() == [[0], [8 * 7 * 17]]


@pytest.mark.parametrize("scheme", [Scheme.W8A8_DYNAMIC, Scheme.W4A8_DYNAMIC])
def test_t11_scales_in_the_models_dtype_give_other_integers(scheme: Scheme) -> None:
    """bfloat16 holds another scale, by up to 2**-9, and some quotients fall on the other side of a half."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    in_float32 = recipe_of(weight, scheme)
    in_bfloat16 = replace(in_float32, weight_format=WeightFormat.PER_CHANNEL, scale_dtype=torch.bfloat16)
    wide, narrow = (make_tensors(recipe, "place", weight) for recipe in (in_float32, in_bfloat16))
    assert torch.equal(narrow["weight_scale"], wide["weight_scale"].bfloat16().float())
    assert not torch.equal(narrow["weight_scale"], wide["weight_scale"])
    assert not torch.equal(narrow["weight"], wide["weight"])
    codes = narrow["weight"] if scheme is Scheme.W8A8_DYNAMIC else torch.tensor(unpack(narrow["weight"]))
    step = narrow["weight_scale"]
    assert ((codes * step - weight.float()).abs() <= step * (0.5 + 127 * 2.0**-8)).all()
