"""The kernels against loops and the slow reference, on every sort of row."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_loops import (
    FLOATS,
    bfloat16,
    codes_of,
    loop_row,
    loop_scale_bias,
    loop_two_level,
    recipe_of,
    same,
    same_tensors,
    unpack,
)
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.kernels import pack_int4 as kernels
from fxquant.kernels.module_tensors import make_tensors, rounded_weight
from fxquant.schemes.schemes import ActivationRange, Scheme, tensor_specs
from fxquant.verification.reference import expected_tensors

# every sort of row, against the loops and the reference


def row_of(kind: str, dtype: torch.dtype, k: int, generator: torch.Generator) -> Tensor:
    limits = torch.finfo(dtype)
    signs = torch.randint(0, 2, (k,), generator=generator) * 2.0 - 1
    row = torch.zeros(k)
    if kind == "random":
        row = torch.randn(k, generator=generator) * 10.0 ** torch.randint(-6, 5, (1,), generator=generator)
    elif kind == "subnormal":
        largest = int(torch.tensor([40, 400]).take(torch.randint(2, (1,), generator=generator)))
        units = torch.randint(-largest, largest + 1, (k,), generator=generator)
        row = (units.double() * limits.smallest_normal * limits.eps).float()
    elif kind == "spike":
        row = torch.where(torch.arange(k) == torch.randint(k, (1,), generator=generator), 1e4, 1e-3) * signs
    elif kind == "constant":
        row = torch.full((k,), 0.3) * signs[0]
    elif kind == "maximum":
        row = signs * limits.max
    return row.clamp(limits.min, limits.max)


KINDS = ("random", "subnormal", "zeros", "spike", "constant", "maximum")
GROUP = 32


@st.composite
def weights(draw: Callable) -> Tensor:
    """[n, 64] with n even, each row of one kind."""
    dtype = draw(st.sampled_from(FLOATS))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=3)) * 2
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.stack([row_of(kind, dtype, 2 * GROUP, generator) for kind in kinds]).to(dtype)


every_row = settings(deadline=None, max_examples=80)


@every_row
@given(weights())
def test_int8_is_its_formula(weight: Tensor) -> None:
    q, scale, _ = codes_of(weight, Scheme.W8A8_DYNAMIC)
    loops = [loop_row(row, 127, -128, 127) for row in weight.float().numpy()]
    assert q.tolist() == [codes for codes, _ in loops]
    assert same(scale, torch.tensor([[float(s)] for _, s in loops]))
    assert torch.isfinite(scale).all()


@every_row
@given(weights())
def test_int4_per_channel_is_its_formula(weight: Tensor) -> None:
    q, scale, _ = codes_of(weight, Scheme.W4A8_DYNAMIC)
    loops = [loop_row(row, 7, -8, 7) for row in weight.float().numpy()]
    assert q.tolist() == [codes for codes, _ in loops]
    assert same(scale, torch.tensor([[float(s)] for _, s in loops]))
    assert torch.isfinite(scale).all()
    biases = [loop_scale_bias(codes, float(s), [1], 16) for codes, s in loops]
    assert same(kernels.scale_bias(q, scale, None, 16), torch.tensor(biases, dtype=torch.float64).float())


@every_row
@given(weights())
def test_int4_two_level_is_its_formula(weight: Tensor) -> None:
    q4, scale, second = codes_of(weight, Scheme.W4A8_DYNAMIC, GROUP)
    loops = [loop_two_level(row, GROUP) for row in weight.float().numpy()]
    assert q4.tolist() == [codes for codes, _, _ in loops]
    assert same(scale, torch.tensor([[float(s)] for _, s, _ in loops]))
    assert second.tolist() == [seconds for _, _, seconds in loops]
    assert unpack(kernels.pack_int4(q4)) == q4.tolist()
    for chunks in (1, 16):
        biases = [loop_scale_bias(codes, bfloat16(s), seconds, chunks) for codes, s, seconds in loops]
        assert same(kernels.scale_bias(q4, scale, second, chunks), torch.tensor(biases, dtype=torch.float64).float())


@every_row
@given(weights())
def test_two_level_codes_times_second_scale_fit_int8(weight: Tensor) -> None:
    q4, scale, second = codes_of(weight, Scheme.W4A8_DYNAMIC, GROUP)
    assert torch.isfinite(scale).all()
    assert set(second.flatten().tolist()) <= set(map(float, range(1, 18)))
    assert (q4 * second.repeat_interleave(GROUP, 1)).abs().max() <= 119


RECIPES = [
    (Scheme.W8A8_DYNAMIC, 0, False),
    (Scheme.W4A8_DYNAMIC, GROUP, False),
    (Scheme.W4A8_DYNAMIC, GROUP, True),
    (Scheme.W4A8_DYNAMIC, 0, False),
    (Scheme.W4A8_DYNAMIC, 0, True),
]


@pytest.mark.parametrize(("scheme", "group_size", "row_parallel"), RECIPES)
@settings(deadline=None, max_examples=40)
@given(weights(), st.booleans())
def test_every_tensor_is_that_of_the_reference(
    scheme: Scheme, group_size: int, row_parallel: bool, weight: Tensor, biased: bool
) -> None:
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(1)).to(weight.dtype) if biased else None
    recipe = recipe_of(weight, scheme, group_size, row_parallel=row_parallel, bias=biased, dtype=weight.dtype)
    tensors = make_tensors(recipe, "w", weight, bias)
    assert same_tensors(tensors, expected_tensors(recipe, weight, bias))
    specs = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensor_specs(recipe).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in tensors.items()} == specs


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([(Scheme.W8A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, GROUP)]))
def test_rounded_weight_is_what_the_integers_stand_for(weight: Tensor, scheme: tuple[Scheme, int]) -> None:
    recipe = recipe_of(weight, *scheme)
    tensors = make_tensors(recipe, "w", weight)
    codes = torch.tensor(unpack(tensors["weight"])) if recipe.scheme is Scheme.W4A8_DYNAMIC else tensors["weight"]
    second = tensors.get("weight_scale_second", torch.ones(len(weight), 1))
    expected = codes * second.repeat_interleave(weight.shape[1] // second.shape[1], 1) * tensors["weight_scale"]
    assert torch.equal(rounded_weight(recipe, weight), expected)


def test_rounded_weight_is_near_the_weight() -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    # half a step of the row's scale, plus the float32 rounding of weight / scale and of q * scale
    for scheme, steps in ((Scheme.W8A8, 127), (Scheme.W8A8_DYNAMIC, 127), (Scheme.W4A8_DYNAMIC, 7)):
        step = weight.abs().amax(1, keepdim=True) / steps
        error = (rounded_weight(recipe_of(weight, scheme), weight) - weight).abs()
        assert (error <= step * (0.5 + steps * 2.0**-22)).all()
        assert error.max() > step.min() / 4


# refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("scheme", "group_size"),
    [(Scheme.W8A8, 0), (Scheme.W8A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, GROUP)],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(scheme: Scheme, group_size: int, value: float) -> None:
    weight = torch.zeros(2, 64, dtype=torch.bfloat16)
    weight[1, 3] = value
    recipe = recipe_of(weight, scheme, group_size, activation=ActivationRange(-1, 1))
    with pytest.raises(FxquantError, match="NaN or infinity") as caught:
        make_tensors(recipe, "model.layers.3.up_proj.weight", weight)
    assert caught.value.place == "model.layers.3.up_proj.weight"


def test_a_static_linear_without_range_is_refused_by_name() -> None:
    weight = torch.ones(2, 4)
    with pytest.raises(FxquantError, match="no observed input range") as caught:
        make_tensors(recipe_of(weight, Scheme.W8A8), "w", weight)
    assert caught.value.place == "model.linear"
