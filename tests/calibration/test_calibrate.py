"""Observed ranges against hooks on the eager model, and what calibration refuses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import float_program, inputs, load_model, meta_model, random_ids, write_checkpoint, write_shards
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.errors import FxquantError
from fxquant.models import DeepseekV3
from fxquant.passes import AssignSchemes, Calibrate, PassResult
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.schemes.schemes import ActivationRange, Recipe, Scheme
from fxquant.verification.reference import expected_tensors

STATIC_LINEARS = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in
      ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj")),
    *(f"model.layers.1.mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")),
]  # fmt: skip
MIN_MAX = "extends: deepseek_w4a8\nactivation_statistic: min_max"
ROUNDED = f"{MIN_MAX}\ncalibration_weights: rounded"


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def batches(checkpoint: Checkpoint) -> list[Tensor]:
    """Of three lengths, one of them of two rows."""
    return [random_ids(meta_model(checkpoint), rows, length, length) for rows, length in ((1, 12), (2, 7), (1, 1))]


def policy_of(tmp_path: Path, text: str) -> str:
    (tmp_path / "policy.yaml").write_text(text)
    return str(tmp_path / "policy.yaml")


def calibrated(
    checkpoint: Checkpoint, policy: str, batches: Callable[[], list[Tensor] | None]
) -> tuple[Program, PassResult]:
    loaded, program = load_policy(policy), float_program(checkpoint)
    AssignSchemes(loaded)(program)
    return program, Calibrate(loaded, checkpoint, batches)(program)


def ranges(program: Program) -> dict[str, ActivationRange]:
    return {module: recipe.activation for module, recipe in program.recipes.items() if recipe.activation is not None}


def hooked(model: DeepseekV3, batches: list[Tensor]) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Module path → (minimum, maximum) of its input in each batch."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple], None]:
        return lambda module, args: seen.setdefault(name, []).append((args[0].min(), args[0].max()))

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in STATIC_LINEARS]
    with torch.no_grad():
        for ids in batches:
            model(*inputs(model, ids))
    for handle in handles:
        handle.remove()
    return seen


def test_min_max_is_that_of_eager_hooks(checkpoint: Checkpoint, batches: list[Tensor], tmp_path: Path) -> None:
    program, result = calibrated(checkpoint, policy_of(tmp_path, MIN_MAX), lambda: batches)
    seen = hooked(load_model(checkpoint), batches)
    expected = {
        name: ActivationRange(min(low for low, _ in extremes).item(), max(high for _, high in extremes).item())
        for name, extremes in seen.items()
    }
    assert ranges(program) == expected
    assert sorted(result.rewritten) == sorted(STATIC_LINEARS) and result.skipped == {}


def test_batch_mean_is_that_of_eager_hooks(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program, _ = calibrated(checkpoint, "deepseek_w4a8", lambda: batches)
    expected = {}
    for name, extremes in hooked(load_model(checkpoint), batches).items():
        means = [torch.stack(values).bfloat16().mean().item() for values in zip(*extremes, strict=True)]
        expected[name] = ActivationRange(*means, torch.bfloat16)
    assert ranges(program) == expected


def test_only_static_recipes_get_a_range_and_the_graph_stays(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    program, _ = calibrated(checkpoint, "deepseek_w4a8", lambda: batches)
    static = {module for module, recipe in program.recipes.items() if recipe.scheme is Scheme.W8A8}
    assert set(ranges(program)) == static == set(STATIC_LINEARS)
    assert str(program.graph.graph) == str(float_program(checkpoint).graph.graph)


# rounded weights


def round_weights(model: DeepseekV3, program: Program, checkpoint: Checkpoint) -> DeepseekV3:
    """Every weight with a recipe becomes what its integers stand for, by the slow reference."""
    for recipe in program.recipes.values():
        tensors = [rounded(recipe, checkpoint.read(f"{module}.weight")) for module in recipe.modules]
        stacked = recipe.modules != (recipe.module,)
        path = recipe.module if stacked else f"{recipe.module}.weight"
        owner, _, name = path.rpartition(".")
        value = torch.stack(tensors) if stacked else tensors[0]
        setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))
    return model


def rounded(recipe: Recipe, weight: Tensor) -> Tensor:
    expected = expected_tensors(recipe, weight, None)
    codes, scale = expected["weight"], expected["weight_scale"]
    if recipe.scheme is Scheme.W4A8_DYNAMIC:
        codes = torch.stack(((codes & 15 ^ 8) - 8, codes >> 4), 1).flatten(0, 1)
        second = expected["weight_scale_second"]
        codes = codes * second.repeat_interleave(recipe.group_size, 1)
    return codes * scale


def test_rounded_weights_are_those_of_the_integers(
    checkpoint: Checkpoint, batches: list[Tensor], tmp_path: Path
) -> None:
    program, _ = calibrated(checkpoint, policy_of(tmp_path, ROUNDED), lambda: batches)
    model = round_weights(load_model(checkpoint), program, checkpoint)
    for name, extremes in hooked(model, batches).items():
        low, high = min(low for low, _ in extremes).item(), max(high for _, high in extremes).item()
        assert ranges(program)[name] == ActivationRange(low, high), name


def test_float_and_rounded_weights_give_different_ranges(
    checkpoint: Checkpoint, batches: list[Tensor], tmp_path: Path
) -> None:
    exact, _ = calibrated(checkpoint, policy_of(tmp_path, MIN_MAX), lambda: batches)
    rough, _ = calibrated(checkpoint, policy_of(tmp_path, ROUNDED), lambda: batches)
    differs = {name for name in STATIC_LINEARS if ranges(exact)[name] != ranges(rough)[name]}
    # all but the two that read the first norm, which comes before any quantized weight
    assert set(STATIC_LINEARS) - differs == set(STATIC_LINEARS[:2])
    for name in differs:
        # int4 experts move activations by their rounding error, about a tenth; another weight would move them freely
        assert abs(ranges(exact)[name].high - ranges(rough)[name].high) < 0.5 * ranges(exact)[name].high, name


# progress


def test_every_node_is_reported(checkpoint: Checkpoint, batches: list[Tensor]) -> None:
    opened: list[tuple[str, int, str]] = []
    done: list[int] = []

    class Bar:
        def __enter__(self) -> Callable[[int], None]:
            return done.append

        def __exit__(self, *error: object) -> None:
            done.append(0)

    def report(stage: str, total: int, unit: str) -> Bar:
        opened.append((stage, total, unit))
        return Bar()

    loaded, program = load_policy("deepseek_w4a8"), float_program(checkpoint)
    AssignSchemes(loaded)(program)
    Calibrate(loaded, checkpoint, lambda: batches, report)(program)
    ((stage, total, unit),) = opened
    assert (stage, unit, sum(done)) == ("calibrate", "nodes", total) and done[-1] == 0


# refusals


@pytest.mark.parametrize("given", [None, []])
def test_static_schemes_without_text_are_refused(given: list[Tensor] | None, checkpoint: Checkpoint) -> None:
    with pytest.raises(FxquantError, match="static schemes need calibration text") as caught:
        calibrated(checkpoint, "deepseek_w4a8", lambda: given)
    assert caught.value.place == "policy deepseek_w4a8"
    assert "deepseek_w4a8_dynamic" in caught.value.remedy


@pytest.mark.parametrize("policy", ["deepseek_w4a8_dynamic", "deepseek_w4a8_per_channel", "float"])
def test_text_is_not_asked_for_when_nothing_is_static(policy: str, checkpoint: Checkpoint) -> None:
    def asked() -> list[Tensor]:
        raise AssertionError("asked for calibration text")

    program, result = calibrated(checkpoint, policy, asked)
    assert result == PassResult("calibrate") and ranges(program) == {}


@pytest.mark.parametrize("policy", [MIN_MAX, ROUNDED], ids=["float", "rounded"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_make_nan_are_refused(value: float, policy: str, batches: list[Tensor], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 5] = value
    write_shards(folder, tensors)
    with pytest.raises(FxquantError, match="calibration produced NaN or infinity") as caught:
        calibrated(open_checkpoint(folder), policy_of(tmp_path, policy), lambda: batches)
    assert caught.value.place == "layers_1_input_layernorm"


@pytest.mark.parametrize("factor", [85, 200], ids=["the width", "the extremes"])
def test_ranges_beyond_the_models_dtype_are_refused(factor: int, batches: list[Tensor], tmp_path: Path) -> None:
    """The forward runs in float32 and sees what overflows float16, in which the parameters are formed and stored."""
    folder = write_checkpoint(tmp_path / "model", dtype=torch.float16)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("shared_experts.gate_proj.weight", "shared_experts.up_proj.weight")):
            tensors[name] *= factor
    write_shards(folder, tensors)
    with pytest.raises(FxquantError, match="float16") as caught:
        calibrated(open_checkpoint(folder), "deepseek_w4a8", lambda: batches)
    assert "shared_experts" in caught.value.place
