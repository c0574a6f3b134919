"""Static linears: parameters, folded biases, and what the linear computes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_loops import EDGE, EPS, FLOATS, bfloat16, loop_row, recipe_of, same, same_tensors
from safetensors.torch import load_file
from torch import Tensor

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.kernels.activation import fused_parameters, static_parameters
from fxquant.kernels.module_tensors import make_tensors
from fxquant.schemes.schemes import ActivationRange, Recipe, Scheme, tensor_specs
from fxquant.verification.reference import contradiction


def static_recipe(weight: Tensor, dtype: torch.dtype, biased: bool, observed: ActivationRange) -> Recipe:
    return recipe_of(weight, Scheme.W8A8, bias=biased, dtype=dtype, activation=observed)


def random_static(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 48, generator=generator)
    weight[2] = 0
    return weight.to(dtype), torch.randn(6, generator=generator).to(dtype)


RANGES = [(-3.0, 2.0), (0.25, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-3, 60.0)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("low", "high"), RANGES)
@pytest.mark.parametrize("arithmetic", ["float32", "model"])
def test_static_parameters_follow_from_range_and_weight(
    dtype: torch.dtype, low: float, high: float, arithmetic: str
) -> None:
    weight, _ = random_static(dtype)
    observed = ActivationRange(low, high, torch.float32 if arithmetic == "float32" else dtype)
    recipe = static_recipe(weight, dtype, False, observed)
    tensors = make_tensors(recipe, "w", weight)
    specs = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensor_specs(recipe).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == specs
    scale, offset = tensors["input_scale"].item(), tensors["input_offset"].item()
    assert offset == int(offset) and -128 <= offset <= 127
    # zero is a code: a padded or masked input costs nothing
    assert ops.quantize_static(torch.zeros(1), tensors["input_scale"], tensors["input_offset"]).item() == offset
    for row, (codes, weight_scale) in enumerate(loop_row(r, 127, -128, 127) for r in weight.float().numpy()):
        deq_scale = np.float32(scale) * weight_scale
        stored = tensors["deq_scale"][row].item()
        assert stored == (int(deq_scale.view(np.int32)) if dtype is torch.float16 else deq_scale)
        assert tensors["quant_bias"][row].item() == -int(offset) * sum(codes)
        assert tensors["weight"][row].tolist() == codes
    assert contradiction(recipe, tensors, None) is None


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_a_range_is_covered_by_its_codes(end: float, other_end: float) -> None:
    low, high = min(end, other_end, 0.0), max(end, other_end, 0.0)
    scale, offset = static_parameters(ActivationRange(min(end, other_end), max(end, other_end)))
    assert scale.item() == max((np.float32(high) - np.float32(low)) / np.float32(255), np.float32(EPS))
    # the offset moves the grid by up to half a code, and so may cut half a step off either end
    assert (-128 - offset.item()) * scale.item() <= low + scale.item() * 0.5001
    assert (127 - offset.item()) * scale.item() >= high - scale.item() * 0.5001


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bias_is_folded_once(dtype: torch.dtype) -> None:
    weight, bias = random_static(dtype)
    weight[2] = 1
    observed = ActivationRange(-3.0, 2.0)
    plain = make_tensors(static_recipe(weight, dtype, False, observed), "w", weight)
    biased = make_tensors(static_recipe(weight, dtype, True, observed), "w", weight, bias)
    assert same(biased.pop("bias"), bias)
    folded = biased.pop("quant_bias") - plain.pop("quant_bias")
    assert same_tensors(biased, plain)
    deq_scale = (biased["weight_scale"].flatten() * biased["input_scale"].float()).numpy()
    assert folded.tolist() == [round(float(b / d)) for b, d in zip(bias.float().numpy(), deq_scale, strict=True)]
    assert folded.abs().min() > 0


def test_bias_and_offset_are_rounded_together() -> None:
    scale, codes = torch.ones(1), torch.tensor([[1]], dtype=torch.int8)
    _, quant_bias = fused_parameters(codes.sum(1), scale.view(1, 1), scale, scale, torch.tensor([0.5]))
    assert quant_bias.tolist() == [0]  # rne(0.5 - 1), not rne(0.5) - 1


def test_a_bias_beyond_int32_is_refused() -> None:
    """An input that was always zero has the smallest scale; 1.0 in units of it is no int32."""
    weight = torch.full((2, 4), 0.01)
    recipe = static_recipe(weight, torch.float32, True, ActivationRange(0.0, 0.0))
    with pytest.raises(FxquantError, match="bias"):
        make_tensors(recipe, "w", weight, torch.ones(2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_static_linear_computes_the_linear(dtype: torch.dtype) -> None:
    weight, bias = random_static(dtype)
    weight[2] = 1
    x = torch.rand(5, 48, generator=torch.Generator().manual_seed(1)) * 5 - 3
    tensors = make_tensors(static_recipe(weight, dtype, True, ActivationRange(-3.0, 2.0)), "w", weight, bias)
    x8 = ops.quantize_static(x, tensors["input_scale"], tensors["input_offset"])
    y = ops.dequantize_static(ops.int_matmul(x8, tensors["weight"]), tensors["deq_scale"], tensors["quant_bias"])
    x_scale, w_scale = tensors["input_scale"].double(), tensors["weight_scale"].double().flatten()
    x_hat = (x8.double() - tensors["input_offset"].double()) * x_scale
    exact = x_hat @ (tensors["weight"].double() * w_scale[:, None]).T + bias.double()
    # rounding the bias to a code: half a step; deq_scale and the product: three roundings of 2**-24 each
    assert ((y - exact).abs() <= x_scale * w_scale * 0.5001 + exact.abs() * 2.0**-22).all()


def test_fused_parameters_take_the_stored_scale() -> None:
    q, weight_scale = torch.tensor([[1, 2, -4]], dtype=torch.int8), torch.tensor([[0.1]])
    scale, offset = torch.tensor([0.3]).bfloat16(), torch.tensor([7.0]).bfloat16()
    deq_scale, quant_bias = fused_parameters(q.sum(1), weight_scale, scale, offset, torch.tensor([1.0]))
    assert deq_scale.tolist() == [np.float32(bfloat16(np.float32(0.3))) * np.float32(0.1)]
    assert quant_bias.tolist() == [round(1.0 / deq_scale.item()) + 7]


@pytest.mark.parametrize("name", ["input_scale", "input_offset", "deq_scale", "quant_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_sees_a_changed_static_tensor(name: str, dtype: torch.dtype) -> None:
    weight, bias = random_static(dtype)
    recipe = static_recipe(weight, dtype, True, ActivationRange(-3.0, 2.0))
    tensors = make_tensors(recipe, "w", weight, bias)
    assert contradiction(recipe, tensors, bias) is None
    tensors[name] = tensors[name].clone()
    tensors[name][0] += 1
    assert name in str(contradiction(recipe, tensors, bias))


if EDGE.is_file():
    EDGE_CASES = [
        (dtype, scheme, group_size, projection)
        for dtype in FLOATS
        for scheme, group_size, projections in (
            (Scheme.W8A8_DYNAMIC, 0, ["gate_proj"]),
            (Scheme.W4A8_DYNAMIC, 256, ["gate_proj", "down_proj"]),
        )
        for projection in projections
    ]

    @pytest.mark.parametrize(("dtype", "scheme", "group_size", "projection"), EDGE_CASES)
    def test_edge_rows_are_those_of_the_reference_quantizer(
        dtype: torch.dtype, scheme: Scheme, group_size: int, projection: str
    ) -> None:
        stored, name = load_file(EDGE), str(dtype).removeprefix("torch.")
        prefix = f"v0.{name}.{scheme.value.lower()}.{projection}."
        weight = stored[f"in.{name}.weight"]
        recipe = recipe_of(weight, scheme, group_size, row_parallel=projection == "down_proj", dtype=dtype)
        expected = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
        assert same_tensors(make_tensors(recipe, "w", weight), expected)
