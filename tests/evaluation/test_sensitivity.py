"""One module quantized at a time: against a policy that names that module alone."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import float_program, meta_model, random_ids, rewritten
from token_files import token_ids
from torch import Tensor, fx

from fxquant import CompileOptions, compile, evaluate
from fxquant.api import sensitivity
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.evaluation.divergence import evaluate_programs
from fxquant.evaluation.sensitivity import measure_sensitivity
from fxquant.evaluation.sensitivity_report import Sensitivity
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import RecipeWeights
from fxquant.tools.main import run

POLICY = "deepseek_w4a8_per_channel"
EXPERTS = "model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def batches(checkpoint: Checkpoint) -> list[Tensor]:
    """Of more than one chunk."""
    return [random_ids(meta_model(checkpoint), 1, length, seed) for seed, length in enumerate((9, 5, 7) * 3)]


@pytest.fixture(scope="module")
def measured(checkpoint: Checkpoint, batches: list[Tensor]) -> Sensitivity:
    program = rewritten(checkpoint, POLICY)
    original = (float_program(checkpoint), checkpoint.read)
    return measure_sensitivity(original, (program, RecipeWeights(program, checkpoint)), batches)


def test_every_quantized_module_once(measured: Sensitivity) -> None:
    assert [module_loss.module for module_loss in measured.modules].count(EXPERTS) == 1
    assert len(measured.modules) == 2 * 4 + 3 + 3 + 1  # attentions, dense MLP, shared expert, routed experts
    assert (measured.tokens, measured.documents) == (3 * (8 + 4 + 6), 9)


@pytest.mark.parametrize(
    "module, pattern, scheme",
    [
        ("model.layers.0.self_attn.q_a_proj", None, "W8A8_DYNAMIC"),
        ("model.layers.1.self_attn.o_proj", None, "W8A8_DYNAMIC"),
        ("model.layers.1.mlp.shared_experts.down_proj", None, "W8A8_DYNAMIC"),
        (EXPERTS, f"{EXPERTS}.*", "W4A8_DYNAMIC"),
    ],
)
def test_as_a_policy_of_that_module_alone(
    module: str,
    pattern: str | None,
    scheme: str,
    measured: Sensitivity,
    checkpoint: Checkpoint,
    batches: list[Tensor],
    tmp_path: Path,
) -> None:
    policy = tmp_path / "one.yaml"
    rounding = ", algorithm: clip" if scheme == "W4A8_DYNAMIC" else ""
    rule = f'{{path: "{pattern or module}", scheme: {scheme}{rounding}}}'
    policy.write_text(f'rules: [{rule}, {{path: "*", scheme: FLOAT}}]')
    program, original = rewritten(checkpoint, policy), float_program(checkpoint)
    read = RecipeWeights(program, checkpoint)
    (expected,) = evaluate_programs((original, checkpoint.read), [(program, read)], batches)
    (loss,) = (module_loss for module_loss in measured.modules if module_loss.module == module)
    assert loss.scheme == scheme
    assert loss.kl.mean == pytest.approx(expected.kl_mean, rel=1e-9)  # float64 sums in another order
    assert loss.kl.interval == pytest.approx(expected.intervals["kl_mean"], rel=1e-9)
    name = module.removeprefix("model.").replace(".", "_")
    y, quantized = outputs(original, checkpoint.read, batches, name), outputs(program, read, batches, name)
    ratio = y.square().sum() / (y - quantized).square().sum()
    assert loss.sqnr == pytest.approx(10 * math.log10(ratio), rel=1e-9)


def outputs(program: Any, read: Any, batches: list[Tensor], name: str) -> Tensor:
    """float64: all that the node of this name gives."""
    seen: list[Tensor] = []

    def observe(node: fx.Node, values: list[Any], live: object) -> None:
        if node.name == name:
            seen.extend(value.double().flatten() for value in values)

    execute(program, read, [prefill_inputs(program, ids) for ids in batches], observe)
    return torch.cat(seen)


def test_groups_are_sums(measured: Sensitivity) -> None:
    assert [group.name for group in measured.layers] == ["model.layers.0", "model.layers.1"]
    assert {group.name: group.modules for group in measured.kinds} == {
        "attention": 8, "dense_mlp": 3, "shared_expert": 3, "routed_expert": 1,
    }  # fmt: skip
    for groups in (measured.layers, measured.kinds, (measured.total,)):
        assert sum(group.kl.mean for group in groups) == pytest.approx(
            sum(module_loss.kl.mean for module_loss in measured.modules)
        )
        assert sum(group.modules for group in groups) == len(measured.modules)
        assert min(group.sqnr for group in groups) == min(module_loss.sqnr for module_loss in measured.modules)
        assert all(
            group.kl.interval and group.kl.interval[0] <= group.kl.mean <= group.kl.interval[1] for group in groups
        )
    kl = [module_loss.kl.mean for module_loss in measured.worst_first]
    assert kl == sorted(kl, reverse=True)


def test_all_at_once_is_what_evaluate_says(
    measured: Sensitivity, checkpoint: Checkpoint, batches: list[Tensor]
) -> None:
    program = rewritten(checkpoint, POLICY)
    quantized = (program, RecipeWeights(program, checkpoint))
    (expected,) = evaluate_programs((float_program(checkpoint), checkpoint.read), [quantized], batches)
    assert measured.together.mean == pytest.approx(expected.kl_mean, rel=1e-9)


def test_nothing_quantized_and_another_model_are_errors(
    checkpoint: Checkpoint, tiny: Callable[..., Checkpoint], batches: list[Tensor]
) -> None:
    original = (float_program(checkpoint), checkpoint.read)
    with pytest.raises(FxquantError, match="nothing is quantized"):
        measure_sensitivity(original, original, batches)
    larger = tiny(num_hidden_layers=3)
    program = rewritten(larger, POLICY)
    with pytest.raises(FxquantError, match="model.layers.2.*does not multiply by it"):
        measure_sensitivity(original, (program, RecipeWeights(program, larger)), batches)


# the command


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["fxquant", "eval", "out", "--text", "some.txt", *arguments])
    with pytest.raises(SystemExit) as stop:
        run()
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_shows_them(
    measured: Sensitivity, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fxquant.api.sensitivity", lambda *arguments: measured)
    monkeypatch.setattr("fxquant.tools.console.console.width", 200)
    assert command(monkeypatch, "--sensitivity") == 0
    text = capsys.readouterr().out
    assert all(module_loss.module in text and f"{module_loss.kl.mean:.2e}" in text for module_loss in measured.modules)
    assert all(f"{group.kl.mean:.2e}" in text for group in (*measured.layers, *measured.kinds, measured.total))
    assert command(monkeypatch, "--sensitivity", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document == measured.as_json()
    assert [module_loss["module"] for module_loss in document["modules"]] == [
        module_loss.module for module_loss in measured.worst_first
    ]


@pytest.mark.parametrize(
    "arguments, fact",
    [
        (["--plot", "a.png"], "Add --sensitivity"),
        (["--sensitivity", "--as-engine"], "Leave out --as-engine"),
        (["--sensitivity", "--plot", "a.pdf"], "neither .png nor .svg"),
        (["--sensitivity", "--plot", "nowhere/a.svg"], "its folder does not exist"),
    ],
)
def test_options_that_do_not_go_together(
    arguments: list[str], fact: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *arguments) == 1
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_picture_names_every_module(
    suffix: str, measured: Sensitivity, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr("fxquant.api.sensitivity", lambda *arguments: measured)
    file, again = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    for module_loss in (file, again):
        assert command(monkeypatch, "--sensitivity", "--plot", str(module_loss)) == 0
    assert file.read_bytes() == again.read_bytes()
    if suffix == ".svg":
        text = file.read_text()
        assert all(module_loss.module in text for module_loss in measured.modules)


@pytest.mark.parametrize("policy", ["deepseek_w4a8_msmodelslim_m4", "rotated"])
def test_of_an_output_whose_float_model_is_smoothed(
    policy: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """The float model is smoothed and rotated as the output is, biases included: the KL of all modules together is that
    of `evaluate`, whose float model is the checkpoint's, but for what smoothed weights round once more."""
    if policy == "rotated":
        policy = str(tmp_path / "rotated.yaml")
        Path(policy).write_text("extends: deepseek_w4a8\nrotate: [hidden, heads]")
    text = token_ids(tmp_path / "ids.safetensors", seed=3)
    compile(tiny_folder(), CompileOptions(policy=policy, out=tmp_path / "out", calib=text, export=False, verify=False))
    result, whole = sensitivity(tmp_path / "out", text), evaluate(tmp_path / "out", text)
    assert len(result.modules) == 2 * 4 + 3 + 3 + 1
    assert all(module_loss.sqnr > 10 for module_loss in result.modules)
    assert result.together.mean == pytest.approx(whole.kl_mean, rel=0.2)
