"""What unfinished calibrations are gone on with: other work starts anew and says so, damage is refused."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kills import Killed
from output_folders import same_files
from test_calibration_file import policy_of
from test_calibration_folder import LAYERS, M4, Stages, compiled, killed_after, state_of
from token_files import token_ids

from fxquant import CompileOptions, FxquantError, compile
from fxquant.calibration.resume_folder import STATE
from fxquant.calibration.resume_state import State, load_key, load_state, save_state
from fxquant.transforms.weight_transforms import WeightTransforms


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


Change = Callable[[Path, Path, Path, str], tuple[Path, str]]


def other_text(model: Path, ids: Path, folder: Path, policy: str) -> tuple[Path, str]:
    return token_ids(folder / "other.safetensors", seed=2), policy


def other_smoothing(model: Path, ids: Path, folder: Path, policy: str) -> tuple[Path, str]:
    return ids, policy_of(folder, f"extends: {policy}\nsmooth: [{{kind: attention, method: m4, alpha: 0.6}}]")


def other_static(model: Path, ids: Path, folder: Path, policy: str) -> tuple[Path, str]:
    return ids, policy_of(folder, f"extends: {policy}\nrules: [{{kind: dense_mlp, scheme: W8A8}}]\n")


def other_source(model: Path, ids: Path, folder: Path, policy: str) -> tuple[Path, str]:
    os.utime(model / "model.safetensors")
    return ids, policy


SLOW = pytest.mark.slow
CHANGES = [
    (other_text, M4, "text"),
    pytest.param(other_smoothing, M4, "smooth", marks=SLOW),
    pytest.param(other_static, M4, "weights", marks=SLOW),  # they are rounded as the policy says
    (other_static, "deepseek_w4a8_per_channel_static", "smooth"),  # flex searches its scales by the schemes
    pytest.param(other_source, M4, "source", marks=SLOW),
]


@pytest.mark.parametrize(("change", "policy", "reason"), CHANGES)
def test_other_work_starts_anew_and_says_so(
    change: Change, policy: str, reason: str, model: Path, ids: Path, tmp_path: Path
) -> None:
    source, out, stages = shutil.copytree(model, tmp_path / "model"), tmp_path / "out", Stages()
    with killed_after(60, Killed()):
        compiled(source, out, ids, policy)
    text, policy = change(source, ids, tmp_path, policy)
    compile(
        source, CompileOptions(policy=policy, out=out, calib=text, verify=False, export=False, batch_size=2), stages
    )
    assert stages.calibrate == [f"calibrate again: {reason} changed"]
    assert same_files(out, compiled(source, tmp_path / "fresh", text, policy)) and not state_of(out).parent.exists()


def cut(data: bytearray) -> bytearray:
    return data[:-3]


def flip(data: bytearray) -> bytearray:
    data[-100] ^= 1
    return data


def rename(data: bytearray) -> bytearray:
    return bytearray(bytes(data).replace(b'"blocks":"3"', b'"blocks":"2"'))


def junk(data: bytearray) -> bytearray:
    return bytearray(b"\x00" * 64)


@pytest.mark.parametrize("damage", [cut, flip, rename, junk])
def test_a_damaged_state_is_refused_until_it_is_discarded(
    damage: Callable[[bytearray], bytearray], model: Path, ids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with killed_after(70, Killed()):
        compiled(model, out, ids)
    state = state_of(out)
    before = state.read_bytes()
    state.write_bytes(damage(bytearray(before)))
    assert state.read_bytes() != before
    with pytest.raises(FxquantError, match="unfinished calibration (is|cannot)") as caught:
        compiled(model, out, ids)
    assert caught.value.place == str(state) and "--restart" in caught.value.remedy
    assert state.is_file() and not out.exists()
    compiled(model, out, ids, restart=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_every_value_comes_back_as_it_was(tmp_path: Path) -> None:
    values = {"x": [torch.randn(2, 3).bfloat16(), torch.randn(0, 4)], "pair": [(torch.arange(3), torch.randn(2))] * 11}
    ranges = {"x": (torch.randn(2), torch.randn(2))}
    state = State(3, values, ranges, {"gate": torch.arange(4)}, WeightTransforms({"w": torch.ones(2)}, {"c": "w"}))
    assert save_state(state, tmp_path / STATE, {"text": "a"})
    loaded = load_state(tmp_path / STATE)
    assert load_key(tmp_path / STATE)["text"] == "a" and loaded.blocks == 3
    assert repr(loaded) == repr(State(3, dict(sorted(values.items())), ranges, state.experts, state.transforms))
    assert not save_state(State(4, {"x": [torch.ones(2).bool()]}, {}, {}, WeightTransforms()), tmp_path / STATE, {})
    assert load_state(tmp_path / STATE).blocks == 3
