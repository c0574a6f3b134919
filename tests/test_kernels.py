"""Weights and ranges to integers: the published vectors, loops of this file, and `fxquant.reference`, all with ==."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.kernels import weight as kernels
from fxquant.kernels.activation import encode_deq_scale, fused_parameters, static_parameters
from fxquant.kernels.recipe import make_tensors, rounded_weight
from fxquant.reference import contradiction, expected_tensors
from fxquant.schemes import ActivationRange, Recipe, Scheme, tensor_specs

EPS = 1.1920928955078125e-07
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EDGE = Path(__file__).parents[2] / "shared/conformance/msmodelslim/edge.safetensors"
"""Tensors that the reference quantizer wrote, where somebody put them beside the repository."""


def recipe_of(weight: Tensor, scheme: Scheme, group_size: int = 0, **changes: object) -> Recipe:
    n, k = weight.shape
    made = Recipe("model.linear", ("model.linear",), scheme, group_size, n, k, False, False, torch.bfloat16)
    return replace(made, **changes)


def same(x: Tensor, y: Tensor) -> bool:
    """Equal in dtype, shape and every bit."""
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (x, y)]
    return x.dtype is y.dtype and x.shape == y.shape and torch.equal(*bits)


def same_tensors(made: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return set(made) == set(expected) and all(same(made[name], expected[name]) for name in expected)


def unpack(packed: Tensor) -> list[list[int]]:
    """Bytes [n/2, k] → rows [n, k], nibble by nibble."""
    rows = []
    for byte_row in packed.tolist():
        low, high = [(byte & 15) for byte in byte_row], [(byte >> 4 & 15) for byte in byte_row]
        rows += [[nibble - 16 if nibble > 7 else nibble for nibble in row] for row in (low, high)]
    return rows


# the formulas once more, one number at a time


def rounded(value: np.float32, low: int, high: int) -> int:
    """Python rounds halves to even, as the format does."""
    return min(max(round(float(value)), low), high)


def loop_row(row: np.ndarray, maximum: int, low: int, high: int) -> tuple[list[int], np.float32]:
    scale = max(abs(value) for value in row) / np.float32(maximum)
    return [0 if scale == 0 else rounded(value / scale, low, high) for value in row], scale


def loop_two_level(row: np.ndarray, group_size: int) -> tuple[list[int], np.float32, list[int]]:
    q8, scale = loop_row(row, 119, -119, 119)  # bounds that only a subnormal scale, a rounded one, can reach
    q4, seconds = [], []
    for start in range(0, len(q8), group_size):
        group = q8[start : start + group_size]
        seconds.append(max(1, round(max(abs(q) for q in group) / 7)))
        q4 += [min(max(round(q / seconds[-1]), -8), 7) for q in group]
    return q4, scale, seconds


def loop_scale_bias(q4: list[int], scale: float, seconds: list[int], chunks: int) -> list[float]:
    weights = [q * seconds[index * len(seconds) // len(q4)] for index, q in enumerate(q4)]
    width = len(q4) // chunks
    return [8 * scale * sum(weights[start : start + width]) for start in range(0, len(q4), width)]


def bfloat16(value: np.float32) -> float:
    """Round half to even at 16 bits, on the bits."""
    bits = int(np.float32(value).view(np.uint32))
    return float(np.uint32(bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).view(np.float32))


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
    _, scale, second = kernels.quantize_int4_two_level(weight, 2)
    assert scale.flatten().tolist() == [1.0] * len(SECONDS)
    assert second.tolist() == [[17.0, float(expected)] for expected in SECONDS.values()]


def test_t3_saturation() -> None:
    weight = torch.tensor([[119.0, 0, 0, 0, 10, -5, 3, -10]])
    q4, _, second = kernels.quantize_int4_two_level(weight, 4)
    assert second.tolist() == [[17, 1]]
    assert q4[0, 4:].tolist() == [7, -5, 3, -8]


def test_t4_rounding() -> None:
    weight = torch.tensor([[127.0, 0.5, 1.5, 2.5, -7.5, 126.6]])
    q, scale = kernels.quantize_int8(weight)
    assert (q.tolist(), scale.tolist()) == ([[127, 0, 2, 2, -8, 127]], [[1.0]])
    # a weight never exceeds its own scale, an activation does
    assert ops.quantize_static(torch.tensor([-128.4]), torch.ones(1), torch.zeros(1)).tolist() == [-128]


@pytest.mark.parametrize(
    ("low", "high", "scale", "offset"),
    [(-3, 2, 5 / 255, 25), (1, 2, 2 / 255, -128), (-4, -1, 4 / 255, 127), (0, 0, EPS, -128)],
)
def test_t5_static_parameters(low: float, high: float, scale: float, offset: float) -> None:
    made = static_parameters(ActivationRange(low, high))
    assert [value.dtype for value in made] == [torch.float32] * 2
    assert [value.item() for value in made] == [np.float32(scale), offset]


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
    made = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    assert made["weight_scale"].flatten().tolist() == [np.float32(peak) / np.float32(119) for peak in (16, 2)]
    assert made["weight_scale_second"].tolist() == [[17, 16], [17, 17]]
    assert made["weight"].tolist() == [[byte - 256 if byte > 127 else byte for byte in T8_BYTES]]
    assert unpack(made["weight"]) == [T8_ROW_0, ([-7, -3, 0, 3, 7] * 7)[:32]]
    assert made["scale_bias"].tolist() == [[-132.609375], [-22.91015625]]
    row_parallel = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16, row_parallel=True), "w", weight)
    assert row_parallel["scale_bias"][0].tolist() == T8_CHUNKS
    assert row_parallel["scale_bias"].sum(1).tolist() == [-132.609375, -22.91015625]


def test_t9_scale_bias_completes_the_split_activation() -> None:
    """16 hi + lo + 8 is the activation: two products on nibbles plus scale_bias are the product on x."""
    weight = t8_weight()
    made = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    scale = made["weight_scale"].bfloat16().double()
    d = torch.tensor(unpack(made["weight"])).double() * made["weight_scale_second"].repeat_interleave(16, 1) * scale
    x = torch.arange(-128, 128)[torch.randperm(256, generator=torch.Generator().manual_seed(0))].view(8, 32)
    hi, lo = (x / 16).floor(), x % 16 - 8
    assert torch.equal(16 * (hi.double() @ d.T) + lo.double() @ d.T + made["scale_bias"].flatten(), x.double() @ d.T)


def test_t10_zero_row() -> None:
    weight = torch.zeros(2, 32)
    weight[1, 0] = 119.0
    made = make_tensors(recipe_of(weight, Scheme.W4A8_DYNAMIC, 16), "w", weight)
    assert made["weight_scale"].tolist() == [[0], [1]]
    assert made["weight_scale_second"].tolist() == [[1, 1], [17, 1]]
    assert unpack(made["weight"]) == [[0] * 32, [7] + [0] * 31]
    assert made["scale_bias"].tolist() == [[0], [8 * 7 * 17]]


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
    q, scale = kernels.quantize_int8(weight.float())
    loops = [loop_row(row, 127, -128, 127) for row in weight.float().numpy()]
    assert q.tolist() == [codes for codes, _ in loops]
    assert same(scale, torch.tensor([[float(s)] for _, s in loops]))
    assert torch.isfinite(scale).all()


@every_row
@given(weights())
def test_int4_per_channel_is_its_formula(weight: Tensor) -> None:
    q, scale = kernels.quantize_int4_per_channel(weight.float())
    loops = [loop_row(row, 7, -8, 7) for row in weight.float().numpy()]
    assert q.tolist() == [codes for codes, _ in loops]
    assert same(scale, torch.tensor([[float(s)] for _, s in loops]))
    assert torch.isfinite(scale).all()
    biases = [loop_scale_bias(codes, float(s), [1], 16) for codes, s in loops]
    assert same(kernels.scale_bias(q, scale, None, 16), torch.tensor(biases, dtype=torch.float64).float())


@every_row
@given(weights())
def test_int4_two_level_is_its_formula(weight: Tensor) -> None:
    q4, scale, second = kernels.quantize_int4_two_level(weight.float(), GROUP)
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
    q4, scale, second = kernels.quantize_int4_two_level(weight.float(), GROUP)
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
    made = make_tensors(recipe, "w", weight, bias)
    assert same_tensors(made, expected_tensors(recipe, weight, bias))
    specs = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensor_specs(recipe).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in made.items()} == specs


@settings(deadline=None, max_examples=40)
@given(weights(), st.sampled_from([(Scheme.W8A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, 0), (Scheme.W4A8_DYNAMIC, GROUP)]))
def test_rounded_weight_is_what_the_integers_stand_for(weight: Tensor, scheme: tuple[Scheme, int]) -> None:
    recipe = recipe_of(weight, *scheme)
    made = make_tensors(recipe, "w", weight)
    codes = torch.tensor(unpack(made["weight"])) if recipe.scheme is Scheme.W4A8_DYNAMIC else made["weight"]
    second = made.get("weight_scale_second", torch.ones(len(weight), 1))
    expected = codes * second.repeat_interleave(weight.shape[1] // second.shape[1], 1) * made["weight_scale"]
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
    with pytest.raises(FxquantError, match="never observed") as caught:
        make_tensors(recipe_of(weight, Scheme.W8A8), "w", weight)
    assert caught.value.place == "model.linear"


# static linears


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
    made = make_tensors(recipe, "w", weight)
    specs = {suffix: (spec.dtype, spec.shape) for suffix, spec in tensor_specs(recipe).items()}
    assert {suffix: (tensor.dtype, tuple(tensor.shape)) for suffix, tensor in made.items()} == specs
    scale, offset = made["input_scale"].item(), made["input_offset"].item()
    assert offset == int(offset) and -128 <= offset <= 127
    # zero is a code: a padded or masked input costs nothing
    assert ops.quantize_static(torch.zeros(1), made["input_scale"], made["input_offset"]).item() == offset
    for row, (codes, weight_scale) in enumerate(loop_row(r, 127, -128, 127) for r in weight.float().numpy()):
        deq_scale = np.float32(scale) * weight_scale
        stored = made["deq_scale"][row].item()
        assert stored == (int(deq_scale.view(np.int32)) if dtype is torch.float16 else deq_scale)
        assert made["quant_bias"][row].item() == -int(offset) * sum(codes)
        assert made["weight"][row].tolist() == codes
    assert contradiction(recipe, made, None) is None


@settings(deadline=None, max_examples=60)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-1e4, 1e4, width=32))
def test_a_range_is_covered_by_its_codes(one: float, other: float) -> None:
    low, high = min(one, other, 0.0), max(one, other, 0.0)
    scale, offset = static_parameters(ActivationRange(min(one, other), max(one, other)))
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
    one, codes = torch.ones(1), torch.tensor([[1]], dtype=torch.int8)
    _, quant_bias = fused_parameters(codes, one.view(1, 1), one, one, torch.tensor([0.5]))
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
    made = make_tensors(static_recipe(weight, dtype, True, ActivationRange(-3.0, 2.0)), "w", weight, bias)
    x8 = ops.quantize_static(x, made["input_scale"], made["input_offset"])
    y = ops.dequantize_static(ops.int_matmul(x8, made["weight"]), made["deq_scale"], made["quant_bias"])
    x_scale, w_scale = made["input_scale"].double(), made["weight_scale"].double().flatten()
    x_hat = (x8.double() - made["input_offset"].double()) * x_scale
    exact = x_hat @ (made["weight"].double() * w_scale[:, None]).T + bias.double()
    # rounding the bias to a code: half a step; deq_scale and the product: three roundings of 2**-24 each
    assert ((y - exact).abs() <= x_scale * w_scale * 0.5001 + exact.abs() * 2.0**-22).all()


def test_fused_parameters_take_the_stored_scale() -> None:
    q, weight_scale = torch.tensor([[1, 2, -4]], dtype=torch.int8), torch.tensor([[0.1]])
    scale, offset = torch.tensor([0.3]).bfloat16(), torch.tensor([7.0]).bfloat16()
    deq_scale, quant_bias = fused_parameters(q, weight_scale, scale, offset, torch.tensor([1.0]))
    assert deq_scale.tolist() == [np.float32(bfloat16(np.float32(0.3))) * np.float32(0.1)]
    assert quant_bias.tolist() == [round(1.0 / deq_scale.item()) + 7]


@pytest.mark.parametrize("name", ["input_scale", "input_offset", "deq_scale", "quant_bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_reference_sees_a_changed_static_tensor(name: str, dtype: torch.dtype) -> None:
    weight, bias = random_static(dtype)
    recipe = static_recipe(weight, dtype, True, ActivationRange(-3.0, 2.0))
    made = make_tensors(recipe, "w", weight, bias)
    assert contradiction(recipe, made, bias) is None
    made[name] = made[name].clone()
    made[name][0] += 1
    assert name in str(contradiction(recipe, made, bias))


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
