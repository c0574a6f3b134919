"""Batches of activations to static parameters, against a loop in the arithmetic of each dtype."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fxquant.kernels.recipe import make_tensors
from fxquant.passes.observe import combine
from fxquant.policy import ActivationStatistic
from fxquant.schemes import ActivationRange, Recipe, Scheme

DATA = json.loads((Path(__file__).parent / "data/activations.json").read_text())["linears"]
PRODUCED = Path(__file__).parents[2] / "shared/conformance/msmodelslim"
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
    made = make_tensors(recipe, "m.weight", tensor(weight))
    scale, offset = parameters(low, high, ROUND[dtype])
    assert made["input_scale"].tolist() == [scale] and made["input_offset"].tolist() == [offset]
    for row in range(4):
        values = decode(weight)[16 * row : 16 * row + 16]
        weight_scale = max(abs(value) for value in values) / np.float32(127)
        codes = [round(float(value / weight_scale)) for value in values]
        deq_scale = scale * weight_scale
        stored = int(deq_scale.view(np.int32)) if dtype is torch.float16 else deq_scale
        assert made["deq_scale"][row].item() == stored
        assert made["quant_bias"][row].item() == -int(offset) * sum(codes)


@pytest.mark.parametrize("name", sorted(DATA))
def test_min_max_over_all_batches_in_float32(name: str) -> None:
    batches = [tensor(bits) for bits in DATA[name]["batches"]]
    values = [value for bits in DATA[name]["batches"] for value in decode(bits)]
    result = observed(batches, ActivationStatistic.MIN_MAX, torch.bfloat16)
    assert result == ActivationRange(min(values), max(values), torch.float32)
    assert result == observed(batches[::-1], ActivationStatistic.MIN_MAX, torch.float16)

    recipe = Recipe("m", ("m",), Scheme.W8A8, 0, 4, 16, False, False, torch.bfloat16, result)
    made = make_tensors(recipe, "m.weight", tensor(DATA[name]["weight"]))
    scale, offset = parameters(min(values), max(values), np.float32)
    assert made["input_scale"].tolist() == [bfloat16(scale)] and made["input_offset"].tolist() == [offset]


@pytest.mark.parametrize("name", sorted(DATA))
def test_the_shipped_batches_tell_the_statistics_and_dtypes_apart(name: str) -> None:
    batches = [tensor(bits) for bits in DATA[name]["batches"]]
    results = {observed(batches, statistic, dtype) for statistic in ActivationStatistic for dtype in ROUND}
    assert len({(result.low, result.high) for result in results}) >= 3


def test_the_mean_of_bfloat16_is_not_that_of_float32() -> None:
    lows, highs = torch.tensor([-1.0, -1.0078125]), torch.tensor([3.0, 3.015625])
    result = combine(list(lows), list(highs), ActivationStatistic.BATCH_MEAN, torch.bfloat16)
    assert (result.low, result.high) == (-1.0, 3.0)  # ties to even; float32 would keep -1.00390625 and 3.0078125


if PRODUCED.is_dir():
    ACTIVATIONS = load_file(PRODUCED / "v0_bf16_acts.safetensors")
    LINEARS = sorted({name.rpartition(".")[0] for name in ACTIVATIONS})
    CASES = [(linear, linear) for linear in LINEARS]
    CASES += [(name.replace("q_a_proj", "kv_a_proj_with_mqa"), name) for name in LINEARS if name.endswith("q_a_proj")]

    @pytest.mark.parametrize(("linear", "source"), CASES)
    def test_static_parameters_are_those_of_the_reference_quantizer(linear: str, source: str) -> None:
        """q_a_proj and kv_a_proj_with_mqa read the same activations."""
        (file,) = (PRODUCED / "v0_bf16_ascendV1").glob("*.safetensors")
        written, weight = load_file(file), load_file(PRODUCED / "model/model.safetensors")[f"{linear}.weight"]
        batches = [ACTIVATIONS[f"{source}.{index}"] for index in range(4)]
        result = observed(batches, ActivationStatistic.BATCH_MEAN, torch.bfloat16)
        recipe = Recipe(linear, (linear,), Scheme.W8A8, 0, *weight.shape, False, False, torch.bfloat16, result)
        made = make_tensors(recipe, f"{linear}.weight", weight)
        for suffix in ("input_scale", "input_offset", "deq_scale", "quant_bias", "weight", "weight_scale"):
            expected = written[f"{linear}.{suffix}"]
            assert made[suffix].dtype is expected.dtype, suffix
            assert torch.equal(made[suffix], expected), suffix
