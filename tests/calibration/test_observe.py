"""Batches of activations to static parameters, against a loop in the arithmetic of each dtype."""

import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from places import REFERENCE
from safetensors.torch import load_file
from torch import Tensor

from fxquant.calibration.observers import combine, histogram_range, percentile_range
from fxquant.kernels.module_tensors import make_tensors
from fxquant.policy.policy import ActivationStatistic
from fxquant.schemes.schemes import ActivationRange, Recipe, Scheme

DATA = json.loads((Path(__file__).with_name("activations.json")).read_text())["linears"]
"""What the reference quantizer observed and wrote, where somebody put it beside the repository."""

Round = Callable[[float], np.float32]


def bfloat16(value: float) -> np.float32:
    """float32 rounded half to even at its upper 16 bits."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint32(bits + 0x7FFF + (bits >> 16 & 1) >> 16 << 16).view(np.float32)


def float16(value: float) -> np.float32:
    return np.float32(np.float16(value))


ROUND: dict[torch.dtype, Round] = {torch.bfloat16: bfloat16, torch.float16: float16, torch.float32: np.float32}


def decode(bits: list[int]) -> list[np.float32]:
    return [np.uint32(pattern << 16).view(np.float32) for pattern in bits]


def tensor(bits: list[int], columns: int = 16) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(-1, columns)


def observed(batches: list[Tensor], statistic: ActivationStatistic, dtype: torch.dtype) -> ActivationRange:
    """As calibration observes: minimum and maximum of each batch, in float32."""
    return combine([x.float().min() for x in batches], [x.float().max() for x in batches], statistic, dtype)


def mean(values: list[np.float32], rounded: Round) -> np.float32:
    """Each value and the mean are rounded; the sum is kept in float32."""
    total = np.float32(0)
    for value in values:
        total = np.float32(total + rounded(value))
    return rounded(np.float32(total / np.float32(len(values))))


def parameters(low: np.float32, high: np.float32, rounded: Round) -> tuple[np.float32, np.float32]:
    """scale and offset, rounded after every step."""
    low, high = min(low, np.float32(0)), max(high, np.float32(0))
    scale = max(rounded(rounded(high - low) / np.float32(255)), np.float32(2.0**-23))
    return scale, np.float32(round(float(rounded(-low / scale)))) - np.float32(128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", sorted(DATA))
def test_batch_mean_in_the_models_dtype(name: str, dtype: torch.dtype) -> None:
    weight, batches = DATA[name]["weight"], [decode(bits) for bits in DATA[name]["batches"]]
    result = observed([tensor(bits) for bits in DATA[name]["batches"]], ActivationStatistic.BATCH_MEAN, dtype)

    low, high = (mean([extreme(batch) for batch in batches], ROUND[dtype]) for extreme in (min, max))
    assert (result.low, result.high, result.arithmetic) == (low, high, dtype)

    recipe = Recipe("m", ("m",), Scheme.W8A8, 0, 4, 16, False, False, dtype, result)
    tensors = make_tensors(recipe, "m.weight", tensor(weight))
    scale, offset = parameters(low, high, ROUND[dtype])
    assert tensors["input_scale"].tolist() == [scale] and tensors["input_offset"].tolist() == [offset]
    for row in range(4):
        values = decode(weight)[16 * row : 16 * row + 16]
        weight_scale = max(abs(value) for value in values) / np.float32(127)
        codes = [round(float(value / weight_scale)) for value in values]
        deq_scale = scale * weight_scale
        stored = int(deq_scale.view(np.int32)) if dtype is torch.float16 else deq_scale
        assert tensors["deq_scale"][row].item() == stored
        assert tensors["quant_bias"][row].item() == -int(offset) * sum(codes)


@pytest.mark.parametrize("name", sorted(DATA))
def test_min_max_over_all_batches_in_float32(name: str) -> None:
    batches = [tensor(bits) for bits in DATA[name]["batches"]]
    values = [value for bits in DATA[name]["batches"] for value in decode(bits)]
    result = observed(batches, ActivationStatistic.MIN_MAX, torch.bfloat16)
    assert result == ActivationRange(min(values), max(values), torch.float32)
    assert result == observed(batches[::-1], ActivationStatistic.MIN_MAX, torch.float16)

    recipe = Recipe("m", ("m",), Scheme.W8A8, 0, 4, 16, False, False, torch.bfloat16, result)
    tensors = make_tensors(recipe, "m.weight", tensor(DATA[name]["weight"]))
    scale, offset = parameters(min(values), max(values), np.float32)
    assert tensors["input_scale"].tolist() == [bfloat16(scale)] and tensors["input_offset"].tolist() == [offset]


@pytest.mark.parametrize("name", sorted(DATA))
def test_the_shipped_batches_tell_the_statistics_and_dtypes_apart(name: str) -> None:
    batches = [tensor(bits) for bits in DATA[name]["batches"]]
    results = {observed(batches, statistic, dtype) for statistic in ActivationStatistic for dtype in ROUND}
    assert len({(result.low, result.high) for result in results}) >= 3


def test_the_mean_of_bfloat16_is_not_that_of_float32() -> None:
    lows, highs = torch.tensor([-1.0, -1.0078125]), torch.tensor([3.0, 3.015625])
    result = combine(list(lows), list(highs), ActivationStatistic.BATCH_MEAN, torch.bfloat16)
    assert (result.low, result.high) == (-1.0, 3.0)  # ties to even; float32 would keep -1.00390625 and 3.0078125


def batches_of(seed: int, count: int, scale: float, shift: float) -> list[Tensor]:
    """Values with heavy tails, as activations have them; [tokens, 5] of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(3 + 4 * i, 5, generator=generator) ** 3 * scale + shift) for i in range(count)]


BATCHES = st.builds(
    batches_of, st.integers(0, 2**32), st.integers(1, 4), st.floats(1e-6, 1e6), st.sampled_from([0.0, -3.0, 1e3])
)


@settings(max_examples=100, deadline=None)
@given(BATCHES, st.sampled_from([50.1, 90.0, 99.0, 99.9, 99.99, 100.0]))
def test_percentile_by_sorting(batches: list[Tensor], percent: float) -> None:
    values = sorted(value for batch in batches for value in batch.flatten().tolist())
    place = math.ceil(len(values) * Fraction(percent) / 100)
    lows, highs = percentile_range(batches, percent)
    assert (lows[0].item(), highs[0].item()) == (values[len(values) - place], values[place - 1])
    assert len(lows) == len(highs) == 1


def test_all_of_it_is_the_extremes() -> None:
    batches = batches_of(0, 3, 1.0, 0.0)
    whole = torch.cat(batches)
    assert percentile_range(batches, 100.0) == ([whole.min()], [whole.max()])


def histogram_error(batches: list[Tensor], low: float, high: float, ends: tuple[float, float]) -> float:
    """Of int8 over `low` … `high`, on the middles of 2048 bins between `ends`, each counted one by one."""
    first, last = ends
    width, total = (last - first) / 2048, 0.0
    counts = torch.stack([torch.histc(batch, 2048, first, last) for batch in batches]).sum(0).tolist()
    scale = (high - low) / 255
    offset = round(-low / scale) - 128
    for index, count in enumerate(counts):
        middle = first + (index + 0.5) * width
        code = min(max(round(middle / scale + offset), -128), 127)
        total += count * ((code - offset) * scale - middle) ** 2
    return total


@settings(max_examples=6, deadline=None)
@given(BATCHES)
def test_no_range_of_the_grid_is_better_than_the_histograms(batches: list[Tensor]) -> None:
    """A sample of the 48 × 48 ranges by a loop; sums of 2048 squares in float64 leave 1e-9 of them open."""
    lows, highs = histogram_range(batches)
    whole = torch.cat(batches)
    ends = min(0.0, whole.min().item()), max(0.0, whole.max().item())
    best = histogram_error(batches, lows[0].item(), highs[0].item(), ends)
    for i, j in ((0, 0), (0, 24), (24, 0), (12, 12), (47, 47), (5, 40), (33, 2)):
        low, high = ends[0] * (1 - i / 64), ends[1] * (1 - j / 64)
        assert best <= histogram_error(batches, low, high, ends) * (1 + 1e-6)  # ends are rounded to float32
    assert ends[0] <= lows[0] <= 0 <= highs[0] <= ends[1]


def test_the_histogram_cuts_a_lone_outlier() -> None:
    values = torch.cat([torch.linspace(-1, 1, 1_000_000), torch.tensor([3.0])])
    lows, highs = histogram_range([values.view(-1, 1)])
    assert lows[0] == -1 and 1 <= highs[0] < 1.2


@pytest.mark.parametrize("value", [0.0, -2.0, 5.0])
def test_observers_of_one_value(value: float) -> None:
    batches = [torch.full((4, 3), value)] * 2
    assert percentile_range(batches, 99.9) == ([torch.tensor(value)], [torch.tensor(value)])
    lows, highs = histogram_range(batches)
    combined = combine(lows, highs, ActivationStatistic.HISTOGRAM, torch.bfloat16)
    assert min(combined.low, 0.0) <= value <= max(combined.high, 0.0)


if REFERENCE.is_dir():
    ACTIVATIONS = load_file(REFERENCE / "v0_bf16_acts.safetensors")
    LINEARS = sorted({name.rpartition(".")[0] for name in ACTIVATIONS})
    CASES = [(linear, linear) for linear in LINEARS]
    CASES += [(name.replace("q_a_proj", "kv_a_proj_with_mqa"), name) for name in LINEARS if name.endswith("q_a_proj")]

    @pytest.mark.parametrize(("linear", "source"), CASES)
    def test_static_parameters_are_those_of_the_reference_quantizer(linear: str, source: str) -> None:
        """q_a_proj and kv_a_proj_with_mqa read the same activations."""
        (file,) = (REFERENCE / "v0_bf16_ascendV1").glob("*.safetensors")
        written, weight = load_file(file), load_file(REFERENCE / "model/model.safetensors")[f"{linear}.weight"]
        batches = [ACTIVATIONS[f"{source}.{index}"] for index in range(4)]
        result = observed(batches, ActivationStatistic.BATCH_MEAN, torch.bfloat16)
        recipe = Recipe(linear, (linear,), Scheme.W8A8, 0, *weight.shape, False, False, torch.bfloat16, result)
        tensors = make_tensors(recipe, f"{linear}.weight", weight)
        for suffix in ("input_scale", "input_offset", "deq_scale", "quant_bias", "weight", "weight_scale"):
            expected = written[f"{linear}.{suffix}"]
            assert tensors[suffix].dtype is expected.dtype, suffix
            assert torch.equal(tensors[suffix], expected), suffix
