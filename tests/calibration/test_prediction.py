"""Static ranges of prediction layers: those of a slow float64 run over whole documents; what needs text says so."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from slow_prediction import SlowLayer
from tiny import float_program, inputs, load_model
from torch import Tensor

from fxquant.calibration.batches import Batch
from fxquant.calibration.calibration_file import Calibration
from fxquant.calibration.prediction import shifted
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.errors import FxquantError
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.passes import AssignMtp, AssignSchemes, Calibrate, PairSmoothing
from fxquant.policy.policy import MtpMode, load_policy
from fxquant.program.program import Program
from fxquant.schemes.schemes import Scheme
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.verification.reference import expected_tensors

POLICY = "extends: deepseek_w4a8\nsmooth: []\nactivation_statistic: min_max"
ATTENTION = ["self_attn.q_a_proj", "self_attn.q_b_proj", "self_attn.kv_a_proj_with_mqa", "self_attn.o_proj"]
SHARED = [f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")]
LENGTHS = (9, 4, 6)
ROUNDINGS = 2e-4
"""Of the largest value: six sums of up to 512 float32 terms one after the other, 512 · 2**-24 each."""


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny(num_nextn_predict_layers=2)


@pytest.fixture(scope="module")
def fp8(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny(num_nextn_predict_layers=1, fp8=True)


def documents(lengths: Sequence[int] = LENGTHS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (1, length), generator=generator) for length in lengths]


def calibrated(
    checkpoint: Checkpoint, tmp_path: Path, texts: list[Tensor] | None, more: str = "", size: int = 1, **options: Any
) -> tuple[Program, Calibration]:
    """The program, and its calibration."""
    (tmp_path / "policy.yaml").write_text(f"{POLICY}\n{more}")
    policy = load_policy(str(tmp_path / "policy.yaml")).with_mtp(MtpMode.QUANT, static=True)
    config, program = parse_config(checkpoint.config, "config.json"), float_program(checkpoint)
    AssignSchemes(policy, mtp_paths(config))(program)
    AssignMtp(policy, config, checkpoint, lambda group_size: WeightFormat.PACKED)(program)
    calibrate = Calibrate(policy, checkpoint, lambda: texts, batch_size=size, **options)
    calibrate(program)
    assert calibrate.used is not None
    return program, calibrate.used


def head_inputs(checkpoint: Checkpoint, ids: Tensor, program: Program | None = None) -> np.ndarray:
    """float64 [S, h]: what the head of the eager model reads, with weights rounded by the recipes of `program`."""
    model, seen = load_model(checkpoint), []  # type: Any, list[Tensor]
    for recipe in program.recipes.values() if program else ():
        for expert, module in enumerate(recipe.modules):
            stack = model.get_parameter(recipe.module if len(recipe.modules) > 1 else f"{module}.weight").data
            (stack[expert] if len(recipe.modules) > 1 else stack).copy_(rounded(recipe, checkpoint, module))
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(*inputs(model, ids))
    return seen[0][0].double().numpy()


def rounded(recipe: Any, checkpoint: Checkpoint, module: str) -> Tensor:
    """What the integers of a module stand for, in float32, by the slow reference."""
    tensors = expected_tensors(recipe, checkpoint.read(f"{module}.weight"), None)
    codes = tensors["weight"]
    if recipe.int4:
        codes = torch.stack(((codes & 15 ^ 8) - 8, codes >> 4), 1).flatten(0, 1)
        codes = codes * tensors["weight_scale_second"].repeat_interleave(recipe.group_size, 1)
    return codes * tensors["weight_scale"]


def slow_inputs(checkpoint: Checkpoint, ids: Tensor, program: Program | None = None) -> dict[str, np.ndarray]:
    """Module of a linear of a prediction layer → its input [S, k], at positions that have a token to read."""
    config, found = parse_config(checkpoint.config, "config.json"), {}
    recipes = {m: r for r in program.mtp.recipes.values() for m in r.modules} if program else {}
    hidden, tokens = head_inputs(checkpoint, ids, program), ids[0].numpy()
    for step, path in enumerate(mtp_paths(config), 1):

        def read(name: str, path: str = path) -> np.ndarray:
            module = f"{path}.{name}".removesuffix(".weight")
            recipe = recipes.get(module)
            tensor = checkpoint.read(f"{path}.{name}") if recipe is None else rounded(recipe, checkpoint, module)
            return tensor.double().numpy()

        layer = SlowLayer(config, read)
        hidden = layer.run(hidden[: len(tokens) - step], tokens[step:])
        found |= {f"{path}.{name}": layer.inputs[name] for name in (*ATTENTION, *SHARED)}
    return found


def assert_ranges(calibration: Calibration, slow: list[list[dict[str, np.ndarray]]]) -> None:
    """The ranges are those of `slow`: the documents of each batch."""
    modules = sorted(slow[0][0])
    assert sorted(module for module in calibration.ranges if module in modules) == modules
    for module in modules:
        lows, highs = calibration.ranges[module]
        assert len(lows) == len(highs) == len(slow)
        for low, high, batch in zip(lows.tolist(), highs.tolist(), slow, strict=True):
            values = np.concatenate([document[module].ravel() for document in batch])
            allowed = ROUNDINGS * np.abs(values).max()
            assert abs(low - values.min()) <= allowed and abs(high - values.max()) <= allowed, module


def test_ranges_are_those_of_a_slow_run_over_whole_documents(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, used = calibrated(checkpoint, tmp_path, documents())
    assert_ranges(used, [[slow_inputs(checkpoint, ids)] for ids in documents()])


def test_padding_and_positions_without_a_later_token_are_not_observed(fp8: Checkpoint, tmp_path: Path) -> None:
    _, used = calibrated(fp8, tmp_path, documents(), size=2)
    slow = [slow_inputs(fp8, ids) for ids in documents()]
    assert_ranges(used, [slow[:2], slow[2:]])


def test_on_rounded_weights_prediction_layers_are_rounded_too(fp8: Checkpoint, tmp_path: Path) -> None:
    more = "calibration_weights: rounded\nrules: [{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 256}]"
    program, used = calibrated(fp8, tmp_path, documents(), more)
    assert_ranges(used, [[slow_inputs(fp8, ids, program)] for ids in documents()])


@pytest.mark.parametrize("mode", [MtpMode.NONE, MtpMode.FLOAT])
def test_a_norm_that_prediction_layers_read_is_not_smoothed(mode: MtpMode, fp8: Checkpoint, tmp_path: Path) -> None:
    """They read what the head reads, and nothing in them divides by its scales."""
    (tmp_path / "policy.yaml").write_text("extends: deepseek_w4a8\nrules: [{kind: head, scheme: W8A8_DYNAMIC}]")
    policy = load_policy(str(tmp_path / "policy.yaml")).with_mtp(mode)
    config, program = parse_config(fp8.config, "config.json"), float_program(fp8)
    AssignSchemes(policy, mtp_paths(config))(program)
    AssignMtp(policy, config, fp8, lambda group_size: WeightFormat.PACKED)(program)
    skipped = PairSmoothing(policy)(program).skipped
    assert skipped.get("norm") == (None if mode is MtpMode.NONE else "multi-token prediction layers read it too")


def test_the_layers_get_the_schemes_of_decoder_layers(checkpoint: Checkpoint, tmp_path: Path) -> None:
    program, _ = calibrated(checkpoint, tmp_path, documents())
    for path in program.mtp.layers:
        recipes = {m.removeprefix(f"{path}."): r for m, r in program.mtp.recipes.items() if m.startswith(f"{path}.")}
        static = {name for name, recipe in recipes.items() if recipe.scheme is Scheme.W8A8}
        assert static == {*ATTENTION, *SHARED}
        assert all((recipe.activation is not None) == (name in static) for name, recipe in recipes.items())
        assert {r.scheme for name, r in recipes.items() if name not in static} == {Scheme.W8A8_DYNAMIC}
        assert recipes["self_attn.q_a_proj"].activation == recipes["self_attn.kv_a_proj_with_mqa"].activation


def test_without_text_the_layers_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"those of model\.layers\.2, model\.layers\.3 too, need calibration text"):
        calibrated(checkpoint, tmp_path, None)


def test_a_document_that_a_layer_sees_nothing_of_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"batch 2 has no document of 3 tokens: model\.layers\.3 would see nothing"):
        calibrated(checkpoint, tmp_path, documents((9, 2, 6)))
    calibrated(checkpoint, tmp_path, documents((9, 2, 6)), size=3)


def test_a_calibration_without_these_layers_is_not_taken(checkpoint: Checkpoint, tmp_path: Path) -> None:
    _, used = calibrated(checkpoint, tmp_path, documents())
    again, given = calibrated(checkpoint, tmp_path, None, given=used)
    assert given is used and all(r.activation for r in again.mtp.recipes.values() if r.scheme.static)
    mine = {module: ends for module, ends in used.ranges.items() if not module.startswith("model.layers.3.")}
    part = Calibration(used.seen, used.tokens, mine, used.experts, used.transforms)
    with pytest.raises(FxquantError, match=r"has no range of model\.layers\.3\.mlp\.shared_experts\.down_proj"):
        calibrated(checkpoint, tmp_path, None, given=part)
    _, made = calibrated(checkpoint, tmp_path, documents(), earlier=[part])
    assert made is not part and made.ranges.keys() == used.ranges.keys()


def test_shifted_tokens() -> None:
    batch = Batch(torch.tensor([[5, 6, 7, 8], [9, 3, 2, 2]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))
    one, five = shifted(batch, 1), shifted(batch, 5)
    assert one.ids.tolist() == [[6, 7, 8, 0], [3, 0, 0, 0]] and one.mask.tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert five.ids.tolist() == five.mask.tolist() == [[0] * 4] * 2


def test_the_models_own_observations_stay(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Ranges of decoder layers, and counts of experts, are those of a run without prediction layers."""
    program, with_layers = calibrated(checkpoint, tmp_path, documents())
    policy, plain = load_policy(str(tmp_path / "policy.yaml")), float_program(checkpoint)
    AssignSchemes(policy)(plain)
    alone = Calibrate(policy, checkpoint, documents)
    alone(plain)
    assert alone.used is not None and plain.recipes == program.recipes
    assert all(torch.equal(with_layers.experts[name], counts) for name, counts in alone.used.experts.items())
    assert with_layers.experts.keys() == alone.used.experts.keys()
