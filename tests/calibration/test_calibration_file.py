"""optional/calibration.safetensors: what was seen, once; everything else follows from it without a forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kills import Killed, stop_after
from output_folders import files_of, finished, same_files
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_calibrate import STATIC_LINEARS
from tiny import write_checkpoint
from token_files import token_ids
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compile
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.lowering.weights import Workers
from fxquant.storage.work_folder import Kind, WorkFolder
from fxquant.tools.main import app

STATIC = "deepseek_w4a8"
ROUNDED = f"extends: {STATIC}\ncalibration_weights: rounded\n"
MIN_MAX = f"extends: {STATIC}\nactivation_statistic: min_max\n"


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(fp8=True)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


@pytest.fixture(scope="module")
def whole(model: Path, ids: Path) -> Path:
    """Calibrated on text. Do not write to it."""
    return compiled(model, ids.parent / "whole", calib=ids)


@pytest.fixture
def no_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: object) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr("fxquant.calibration.run.Stream", run)


def compiled(model: Path, out: Path, policy: str = STATIC, **options: object) -> Path:
    compile(model, CompileOptions(policy=policy, out=out, verify=False, export=False, **options))  # type: ignore[arg-type]
    return out


def policy_of(folder: Path, text: str) -> str:
    (folder / "policy.yaml").write_text(text)
    return str(folder / "policy.yaml")


def changed(whole: Path, path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Path:
    """The calibration file of `whole` with `change` applied to its tensors and metadata."""
    with safe_open(whole / CALIBRATION, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in list(file.keys())}, dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def test_the_file_has_one_value_a_batch_of_each_static_linear(whole: Path) -> None:
    tensors = load_file(whole / CALIBRATION)
    names = {f"{module}.input_{end}" for module in STATIC_LINEARS for end in ("low", "high")}
    gate = "model.layers.1.mlp.gate.expert_tokens"
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(("smooth", "transformed"))}
    assert set(tensors) == {"tokens", gate} | names
    # every token goes to two of the eight experts
    assert tensors[gate].shape == (8,) and tensors[gate].dtype is torch.int64 and tensors[gate].sum() == 4 * 24 * 2
    assert torch.equal(tensors["tokens"], torch.full((4,), 24))
    for name in names:
        assert tensors[name].shape == (4,) and tensors[name].dtype is torch.float32
    assert all((tensors[f"{module}.input_low"] < tensors[f"{module}.input_high"]).all() for module in STATIC_LINEARS)
    with safe_open(whole / CALIBRATION, "pt") as file:
        seen = file.metadata()
    transforms = {"smooth", "statistic", "columns", "rows"}
    assert set(seen) == {"format", "graph", "weights", "text", *transforms} and seen["weights"] == "float"
    assert len(seen["graph"]) == 64 and len(seen["text"]) == 32


def test_given_back_it_makes_the_same_bytes_without_text(
    model: Path, whole: Path, tmp_path: Path, no_forward: None
) -> None:
    assert same_files(compiled(model, tmp_path / "out", calibration=whole / CALIBRATION), whole)


def test_another_statistic_takes_the_same_file(
    model: Path, whole: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(tmp_path, MIN_MAX)
    text = compiled(model, tmp_path / "text", policy, calib=ids)
    monkeypatch.setattr("fxquant.calibration.run.Stream", None)
    file = compiled(model, tmp_path / "file", policy, calibration=whole / CALIBRATION)
    assert same_files(file, text) and not same_files(file, whole)
    assert files_of(file)[CALIBRATION] == files_of(whole)[CALIBRATION]


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit_of_this_model(threads: int, model: Path, whole: Path, ids: Path, tmp_path: Path) -> None:
    """Its sums are too short to be split; those of a large model may differ in their last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same_files(compiled(model, tmp_path / "out", calib=ids), whole)
    finally:
        torch.set_num_threads(before)


# unfinished and earlier work


def killed(model: Path, out: Path, ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile that ends after three units."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(3, patch, Killed())
        compiled(model, out, calib=ids, workers=Workers(jobs=1))
    assert finished(out) == 3


def test_killed_it_goes_on_without_calibrating_again(
    model: Path, whole: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    killed(model, out, ids, monkeypatch)
    monkeypatch.setattr("fxquant.calibration.run.Stream", None)
    assert same_files(compiled(model, out, calib=ids), whole)


def test_other_text_is_refused_until_the_work_is_discarded(
    model: Path, whole: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, other = tmp_path / "out", token_ids(tmp_path / "other.safetensors", seed=2)
    killed(model, out, ids, monkeypatch)
    with pytest.raises(FxquantError, match="other integers") as caught:
        compiled(model, out, calib=other)
    assert "--restart" in caught.value.remedy and finished(out) == 3
    compiled(model, out, calib=other, restart=True)
    assert load_calibration(out / CALIBRATION).seen != load_calibration(whole / CALIBRATION).seen


def test_other_text_with_the_same_ranges_is_what_the_output_tells_of(
    model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batches in another order: the extremes over all are the same, and so are the integers."""
    out, policy = tmp_path / "out", policy_of(tmp_path, MIN_MAX)
    (tensor,) = load_file(ids).values()
    save_file({"ids": tensor.flip(0).contiguous()}, tmp_path / "flipped.safetensors")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_after(3, patch, Killed())
        compiled(model, out, policy, calib=ids, workers=Workers(jobs=1))
    compiled(model, out, policy, calib=tmp_path / "flipped.safetensors")
    fresh = compiled(model, tmp_path / "fresh", policy, calib=tmp_path / "flipped.safetensors")
    assert same_files(out, fresh)


def test_a_file_that_was_cut_off_is_made_again(model: Path, whole: Path, ids: Path, tmp_path: Path) -> None:
    """A kill of a version that wrote it in place, or a copy that broke off."""
    file = tmp_path / "out.partial" / "files" / CALIBRATION
    with WorkFolder(tmp_path / "out", Kind.PARTIAL).held():
        file.parent.mkdir(parents=True)
        file.write_bytes((whole / CALIBRATION).read_bytes()[:-3])
    assert same_files(compiled(model, tmp_path / "out", calib=ids), whole)


def test_ranges_of_the_same_text_are_taken_from_an_earlier_output(
    model: Path, whole: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fxquant.calibration.run.Stream", None)
        assert same_files(compiled(model, tmp_path / "out", calib=ids, reuse=whole), whole)
    other = token_ids(tmp_path / "other.safetensors", seed=2)
    out = compiled(model, tmp_path / "other", calib=other, reuse=whole)
    assert same_files(out, compiled(model, tmp_path / "fresh", calib=other))


# what is refused


def test_scales_searched_for_other_schemes_are_not_taken_over(model: Path, ids: Path, tmp_path: Path) -> None:
    """flex looks for the least error of its readers' schemes: an earlier output of others has other scales.
    Ranges of what only the algorithm of the weights tells apart are."""
    first = compiled(model, tmp_path / "first", calib=ids)
    other = policy_of(tmp_path, f"extends: {STATIC}\nrules: [{{kind: routed_expert, scheme: W4A8_DYNAMIC}}]")
    fresh = compiled(model, tmp_path / "fresh", other, calib=ids)
    assert (fresh / CALIBRATION).read_bytes() != (first / CALIBRATION).read_bytes()
    assert same_files(compiled(model, tmp_path / "reused", other, calib=ids, reuse=first), fresh)


def test_scales_for_the_same_schemes_are_taken_over(
    model: Path, whole: Path, ids: Path, tmp_path: Path, no_forward: None
) -> None:
    rule = "{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 256, algorithm: clip}"
    other = policy_of(tmp_path, f"extends: {STATIC}\nrules: [{rule}]")
    out = compiled(model, tmp_path / "out", other, calib=ids, reuse=whole)
    assert (out / CALIBRATION).read_bytes() == (whole / CALIBRATION).read_bytes()


def refused(model: Path, out: Path, calibration: Path, policy: str = STATIC) -> str:
    with pytest.raises(FxquantError) as caught:
        compiled(model, out, policy, calibration=calibration)
    assert not out.exists() and not out.with_name(out.name + ".partial").exists()
    assert "--calib TEXT" in caught.value.remedy or "calibration.safetensors" in caught.value.remedy
    return caught.value.fact


def test_of_another_graph(tiny_folder: Callable[..., Path], whole: Path, tmp_path: Path) -> None:
    other = tiny_folder(num_attention_heads=2, num_key_value_heads=2)
    assert "the file is of graph " in refused(other, tmp_path / "out", whole / CALIBRATION)


def test_seen_on_other_weights(model: Path, whole: Path, ids: Path, tmp_path: Path) -> None:
    policy = policy_of(tmp_path, ROUNDED)
    fact = refused(model, tmp_path / "out", whole / CALIBRATION, policy)
    assert "the file is of float weights, policy policy needs rounded " in fact
    rounded = compiled(model, tmp_path / "rounded", policy, calib=ids)
    assert "rounded " in refused(model, tmp_path / "out", rounded / CALIBRATION)
    assert same_files(compiled(model, tmp_path / "again", policy, calibration=rounded / CALIBRATION), rounded)


Change = Callable[[dict[str, torch.Tensor], dict[str, str]], object]
LOW, HIGH = f"{STATIC_LINEARS[3]}.input_low", f"{STATIC_LINEARS[3]}.input_high"
GATE = "model.layers.1.mlp.gate.expert_tokens"
FAULTS: dict[str, tuple[Change, str]] = {
    "missing module": (lambda t, m: (t.pop(LOW), t.pop(HIGH)), f"no range of {STATIC_LINEARS[3]}"),
    "half a range": (lambda t, m: t.pop(HIGH), f"it has no {HIGH}"),
    "no tokens": (lambda t, m: t.pop("tokens"), "it has no tokens"),
    "no text": (lambda t, m: m.pop("text"), "it has no text"),
    "nan": (lambda t, m: t[LOW].fill_(torch.nan), "holds NaN or infinity"),
    "infinity": (lambda t, m: t[HIGH].fill_(torch.inf), "holds NaN or infinity"),
    "a batch less": (lambda t, m: t.update({LOW: t[LOW][1:].contiguous()}), "do not have one value per batch"),
    "dtype": (lambda t, m: t.update({LOW: t[LOW].double()}), "F64"),
    "part of a token": (lambda t, m: t.update({GATE: t[GATE].double()}), "F64"),
    "no count": (lambda t, m: t[GATE].neg_(), "expert tokens are not counts"),
    "counts of another shape": (lambda t, m: t.update({GATE: t[GATE][None]}), "expert tokens are not counts"),
    "upside down": (lambda t, m: t[LOW].copy_(t[HIGH] + 1), "a minimum is above its maximum"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_file(name: str, model: Path, whole: Path, tmp_path: Path) -> None:
    change, words = FAULTS[name]
    file = changed(whole, tmp_path / "calibration.safetensors", change)
    with pytest.raises(FxquantError, match=words) as caught:
        compiled(model, tmp_path / "out", calibration=file)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.partial").exists()


def test_files_of_another_sort(model: Path, whole: Path, tmp_path: Path) -> None:
    (weights,) = whole.glob("*.safetensors")
    assert refused(model, tmp_path / "out", weights) == "not a calibration file: it has no graph."
    with pytest.raises(FxquantError, match="no such file or folder, but --calibration names it"):
        compiled(model, tmp_path / "out", calibration=tmp_path / "gone")
    with pytest.raises(FxquantError, match=r"config\.json"):
        compiled(model, tmp_path / "out", calibration=model / "config.json")


def test_ranges_and_text_do_not_go_together(model: Path, whole: Path, ids: Path, tmp_path: Path) -> None:
    command = ["compile", str(model), "-o", str(tmp_path / "out"), "--calib", str(ids), "--calibration"]
    with pytest.raises(FxquantError, match="is given together with calibration text") as caught:
        CliRunner().invoke(app, [*command, str(whole / CALIBRATION)], catch_exceptions=False)
    assert "Leave out one" in caught.value.remedy and not list(tmp_path.iterdir())


def test_the_ranges_of_other_weights_are_not_taken_over(tmp_path: Path, ids: Path) -> None:
    """Same names, shapes and text, other numbers: `--reuse` calibrates again."""
    models = [write_checkpoint(tmp_path / name, seed=seed) for name, seed in (("one", 0), ("other", 1))]
    old = compiled(models[0], tmp_path / "old", calib=ids)
    fresh = compiled(models[1], tmp_path / "fresh", calib=ids)
    reused = compiled(models[1], tmp_path / "reused", calib=ids, reuse=old)
    assert (reused / CALIBRATION).read_bytes() == (fresh / CALIBRATION).read_bytes()
    assert (reused / CALIBRATION).read_bytes() != (old / CALIBRATION).read_bytes()
