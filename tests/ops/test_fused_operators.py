"""Fused operators are their sequences bit for bit, in the dialect and in torch.ops.npu on CPU."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ascend_calls import UNIT, floats, npu
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxquant import ops
from fxquant.lowering.ascend.emitted import norm_layouts
from fxquant.lowering.ascend.emitted.norm_composites import add_rms_norm_bias

EPS = 1e-5
SCALE, OFFSET = torch.tensor([0.03]), torch.tensor([-7.0])
shapes = st.tuples(st.integers(1, 3), st.integers(1, 4), st.sampled_from([1, 8, 37, 64]))


def operands(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x1, x2, weight and bias."""
    x1, x2 = floats(*shape, seed=seed) * 3, floats(*shape, seed=seed + 1)
    return [tensor.to(dtype) for tensor in (x1, x2, floats(shape[-1], seed=seed + 2), floats(shape[-1], seed=seed + 3))]


def equal(results: Any, expected: Any) -> bool:
    return len(results) == len(expected) and all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@given(shapes, st.integers(0, 99), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_dialect_fuses_sequences(shape: tuple[int, ...], seed: int, biased: bool, dtype: torch.dtype) -> None:
    x1, x2, weight, bias = operands(shape, seed, dtype)
    given_bias = bias.float() if biased else None
    total = x1 + x2
    y = ops.rms_norm(total, weight, EPS, given_bias)
    assert equal(ops.add_rms_norm(x1, x2, weight, EPS, given_bias), (y, total))
    static = ops.add_rms_norm_quantize_static(x1, x2, weight, EPS, SCALE, OFFSET, given_bias)
    assert equal(static, (ops.quantize_static(y, SCALE, OFFSET), total))
    per_token = ops.add_rms_norm_quantize_per_token(x1, x2, weight, EPS, given_bias)
    assert equal(per_token, (*ops.quantize_per_token(y), total))
    swiglu = ops.swiglu_quantize_per_token(x1, x2)
    assert equal(swiglu, ops.quantize_per_token(ops.swiglu(x1, x2)))


X = floats(2, 3, 8)
WRONG: list[tuple[Callable, tuple, str]] = [
    (ops.add_rms_norm, (X, X[:1], X[0, 0], EPS), "fxq::add_rms_norm: x1 (2, 3, 8) and x2 (1, 3, 8) differ"),
    (ops.add_rms_norm, (X, X.half(), X[0, 0], EPS), "fxq::add_rms_norm: x1 is torch.float32, x2 torch.float16"),
    (ops.add_rms_norm_quantize_per_token, (X, X, X[0, 0, :4], EPS), "x1 has 8 features, weight 4"),
    (ops.add_rms_norm_quantize_static, (X, X, X[0, 0], EPS, X[0, 0], OFFSET), "one scale and one offset"),
    (ops.swiglu_quantize_per_token, (X, X[..., :4]), "gate (2, 3, 8) and up (2, 3, 4) differ"),
]


@pytest.mark.parametrize(("operator", "arguments", "message"), WRONG)
def test_a_shape_rule_names_the_fact(operator: Callable, arguments: tuple, message: str) -> None:
    on_meta = tuple(argument.to("meta") if isinstance(argument, Tensor) else argument for argument in arguments)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        operator(*on_meta)


@given(shapes, st.integers(0, 99), st.booleans())
def test_kernels_compute_the_dialect_in_float32(shape: tuple[int, ...], seed: int, biased: bool) -> None:
    x1, x2, weight, bias = operands(shape, seed)
    beta = bias if biased else None
    y, rstd, total = npu.npu_add_rms_norm(x1, x2, weight, EPS)
    assert equal((y, total), ops.add_rms_norm(x1, x2, weight, EPS))
    assert rstd.shape == (*shape[:-1], 1)
    assert equal(add_rms_norm_bias(x1, x2, weight, bias, EPS), ops.add_rms_norm(x1, x2, weight, EPS, bias))
    scale, offset = SCALE.expand(shape[-1:]), OFFSET.expand(shape[-1:])
    x8, _, total = npu.npu_add_rms_norm_quant(x1, x2, weight, scale, offset, beta, epsilon=EPS)
    assert equal((x8, total), ops.add_rms_norm_quantize_static(x1, x2, weight, EPS, SCALE, OFFSET, beta))
    x8, _, total, scale, _ = npu.npu_add_rms_norm_dynamic_quant(
        x1, x2, weight, beta=beta, epsilon=EPS, output_mask=[True, False]
    )
    expected = ops.add_rms_norm_quantize_per_token(x1, x2, weight, EPS, beta)
    assert equal((x8, scale.unsqueeze(-1), total), expected)
    x8, scale = npu.npu_dequant_swiglu_quant(torch.cat((x1, x2), -1), activate_left=True, quant_mode=1)
    assert equal((x8, scale.unsqueeze(-1)), ops.swiglu_quantize_per_token(x1, x2))


def test_kernels_against_a_loop() -> None:
    """Rows whose floats are far from a tie, in Python numbers: the integers must be these."""
    x1, x2, weight, bias = operands((4, 8), 0)
    x8, _, _ = npu.npu_add_rms_norm_quant(x1, x2, weight, torch.full((8,), 0.03), torch.full((8,), -7.0), bias)
    tokens, _, total, scales, _ = npu.npu_add_rms_norm_dynamic_quant(x1, x2, weight, beta=bias)
    for row in range(4):
        values = [float(a) + float(b) for a, b in zip(x1[row], x2[row], strict=True)]
        root = math.sqrt(sum(value * value for value in values) / 8 + 1e-6)
        y = [v / root * float(w) + float(b) for v, w, b in zip(values, weight, bias, strict=True)]
        top = max(map(abs, y))
        # Of 8 features and a sum: 16 roundings and the bias, each of at most the largest value of the row.
        assert float(scales[row]) == pytest.approx(top / 127, rel=32 * UNIT)
        for column, value in enumerate(y):
            assert_near(int(x8[row, column]), min(127, max(-128, value / 0.03 - 7)))
            assert_near(int(tokens[row, column]), value * 127 / top)
            assert float(total[row, column]) == pytest.approx(values[column], rel=UNIT)


def assert_near(code: int, real: float) -> None:
    """Half a step, and the rounding of some 32 operations on numbers up to 128 and their differences."""
    assert abs(code - real) <= 0.5 + 64 * 128 * UNIT


def test_swiglu_may_activate_either_half() -> None:
    x = floats(3, 16)
    left, right = (half.contiguous() for half in x.chunk(2, -1))
    x8, scale = npu.npu_dequant_swiglu_quant(x, quant_mode=1)
    assert equal((x8, scale.unsqueeze(-1)), ops.swiglu_quantize_per_token(right, left))


def test_nothing_is_rounded_to_bfloat16_between() -> None:
    x1, x2, weight, _ = operands((5, 64), 7, torch.bfloat16)
    x8, _, total, _, _ = npu.npu_add_rms_norm_dynamic_quant(x1, x2, weight, epsilon=EPS)
    y = ops.rms_norm(total.float(), weight.float(), EPS)
    assert total.dtype is torch.bfloat16
    assert torch.equal(x8, ops.quantize_per_token(y)[0])
    assert not torch.equal(x8, ops.quantize_per_token(y.bfloat16())[0])
    rounded = ops.quantize_per_token(ops.swiglu(x1, x2))[0]
    fused, _ = npu.npu_dequant_swiglu_quant(torch.cat((x1, x2), -1), activate_left=True, quant_mode=1)
    assert torch.equal(fused, ops.swiglu_quantize_per_token(x1.float(), x2.float())[0])
    assert not torch.equal(fused, rounded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_layouts_give_the_dtypes_that_devices_take(dtype: torch.dtype, stored: torch.dtype) -> None:
    x1, x2, weight, _ = operands((2, 8), 0, dtype)
    scale = norm_layouts.norm_scale(dtype, torch.tensor([0.25]).to(stored), weight)
    offset = norm_layouts.norm_offset(dtype, torch.tensor([-77.0]).to(stored), weight)
    assert scale.tolist() == [0.25] * 8 and offset.tolist() == [-77] * 8
    assert npu.npu_add_rms_norm_quant(x1, x2, weight, scale, offset)[0].dtype is torch.int8
    wrong = torch.float32 if dtype is torch.bfloat16 else torch.bfloat16
    with pytest.raises(ValueError, match=f"scales1 is {wrong} .* with x {dtype} it is"):
        npu.npu_add_rms_norm_quant(x1, x2, weight, scale.to(wrong), offset)


def test_what_a_kernel_does_not_take_is_named() -> None:
    x, weight = floats(2, 8), floats(8)
    with pytest.raises(ValueError, match="npu_add_rms_norm: x1 and x2 differ"):
        npu.npu_add_rms_norm(x, x.half(), weight)
    with pytest.raises(ValueError, match=r"npu_add_rms_norm_dynamic_quant: beta is torch.float32 \(4,\)"):
        npu.npu_add_rms_norm_dynamic_quant(x, x, weight, beta=weight[:4])
    with pytest.raises(ValueError, match=r"output_mask \[True, True\] is not supported"):
        npu.npu_add_rms_norm_dynamic_quant(x, x, weight, output_mask=[True, True])
    with pytest.raises(ValueError, match="smooth_scale1 is not supported"):
        npu.npu_add_rms_norm_dynamic_quant(x, x, weight, smooth_scale1=weight)
    with pytest.raises(ValueError, match="div_mode False: devices take -1 and True only"):
        npu.npu_add_rms_norm_quant(x, x, weight, weight, None, div_mode=False)
    with pytest.raises(ValueError, match="quant_mode 0 is not supported"):
        npu.npu_dequant_swiglu_quant(x)
    with pytest.raises(ValueError, match="x is torch.int32; integers, which need weight_scale"):
        npu.npu_dequant_swiglu_quant(x.int(), quant_mode=1)
