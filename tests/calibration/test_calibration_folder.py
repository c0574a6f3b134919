"""A calibration that is killed goes on after the last block, to the same bytes."""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from kills import Killed
from output_folders import same_files
from safetensors.torch import load_file
from tiny import write_checkpoint, write_shards
from token_files import token_ids
from torch import fx

from fxquant import CompileOptions, FxquantError, compile
from fxquant.calibration.resume_folder import STATE, CalibrationFolder
from fxquant.calibration.resume_state import State, load_state, save_state
from fxquant.errors import StoppedError
from fxquant.runtime.stream import Block, Stream
from fxquant.storage.lock import locked
from fxquant.storage.work_folder import MARKER

LAYERS, BLOCKS = 4, 5
POLICIES = ["deepseek_w4a8_msmodelslim", "deepseek_w4a8_msmodelslim_m4", "deepseek_w4a8"]
M4 = POLICIES[1]
RUNS = {M4: 2}
"""Policy → runs over the graph, if more than one: on float weights for the scales, on rounded ones for the ranges."""


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path]) -> Path:
    """One dense and three expert layers."""
    return tiny_folder(num_hidden_layers=LAYERS)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


@pytest.fixture(scope="module")
def whole(model: Path, ids: Path) -> Callable[[str], Path]:
    """The output of one go, once a policy."""

    def output(policy: str) -> Path:
        out = ids.parent / policy
        return out if out.exists() else compiled(model, out, ids, policy)

    return output


def compiled(model: Path, out: Path, ids: Path, policy: str = M4, **options: Any) -> Path:
    compile(
        model, CompileOptions(policy=policy, out=out, calib=ids, verify=False, export=False, batch_size=2, **options)
    )
    return out


def state_of(out: Path) -> Path:
    return out.with_name(out.name + ".calibrating") / STATE


@contextmanager
def killed_after(calls: int, error: BaseException) -> Iterator[None]:
    """`error` when so many calls of the graph have been seen."""
    seen, original = iter(range(10**6)), Stream._call

    def call(stream: Stream, node: fx.Node) -> list[Any]:
        if next(seen) == calls:
            raise error
        return original(stream, node)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(Stream, "_call", call)
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that ran to their end."""
    names: list[str] = []
    original = Stream.run

    def run(stream: Stream, block: Block, *arguments: Any) -> None:
        original(stream, block, *arguments)
        names.append(block.name)

    monkeypatch.setattr(Stream, "run", run)
    return names


class Stages:
    """A reporter that remembers what was opened, and how far it came."""

    def __init__(self) -> None:
        self.opened: dict[str, list[int]] = {}

    @contextmanager
    def __call__(self, stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        amounts = self.opened[stage] = [-total]
        yield amounts.append

    @property
    def calibrate(self) -> list[str]:
        return [stage for stage in self.opened if stage.startswith(("calibrate", "resume"))]


# going on


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chance", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_in_some_block_it_ends_with_the_same_bytes(
    policy: str, chance: int, model: Path, ids: Path, whole: Callable[[str], Path], tmp_path: Path, ran: list[str]
) -> None:
    expected, out = whole(policy), tmp_path / "out"
    ran.clear()
    with killed_after(random.Random(f"{policy} {chance}").randint(5, 90 * RUNS.get(policy, 1)), Killed()):
        compiled(model, out, ids, policy)
    finished, stages = len(ran), Stages()
    blocks = BLOCKS * RUNS.get(policy, 1)
    assert 1 <= finished < blocks and load_state(state_of(out)).blocks == finished
    assert sorted(path.name for path in state_of(out).parent.iterdir()) == [MARKER, STATE]
    compile(model, CompileOptions(policy=policy, out=out, calib=ids, verify=False, export=False, batch_size=2), stages)
    assert len(ran) == blocks and len(set(ran)) == BLOCKS
    assert same_files(out, expected) and [path.name for path in tmp_path.iterdir()] == ["out"]
    assert stages.calibrate == [f"resume: block {finished}"] and sum(stages.opened[stages.calibrate[0]]) == 0


def test_killed_after_calibration_nothing_runs_again(
    model: Path,
    ids: Path,
    whole: Callable[[str], Path],
    tmp_path: Path,
    ran: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, out = whole(M4), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("fxquant.verbs.compile.write_output", lambda *arguments: (_ for _ in ()).throw(Killed()))
        compiled(model, out, ids)
    ran.clear()
    assert same_files(compiled(model, out, ids), expected) and not ran and not state_of(out).parent.exists()


def test_only_the_last_state_is_kept(model: Path, ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden states, the rotary table and small results: not once more a layer."""
    sizes, original = [], save_state

    def save(state: State, path: Path, key: Any) -> bool:
        saved = original(state, path, key)
        sizes.append(sum(file.stat().st_size for file in path.parent.iterdir() if file.name != MARKER))
        return saved

    monkeypatch.setattr("fxquant.calibration.resume_folder.save_state", save)
    compiled(model, tmp_path / "out", ids)
    hidden, table = 4 * 24 * 256 * 4, 2 * 4 * 24 * 8 * 4
    assert len(sizes) == BLOCKS * RUNS[M4] and max(sizes[:-1]) < hidden + table + 60_000 and sizes[-1] < 60_000


def test_what_the_world_stops_is_kept_and_said_to_be(
    model: Path, ids: Path, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, left, original = tmp_path / "out", iter([True, True, True, True, False]), os.fsync  # two for the marker

    def fsync(handle: int) -> None:
        if not next(left):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(handle)

    with monkeypatch.context() as patch, pytest.raises(StoppedError, match="No space left") as caught:
        patch.setattr(os, "fsync", fsync)
        compiled(model, out, ids)
    assert f"kept in {state_of(out).parent}: the same command resumes it" in caught.value.remedy
    assert load_state(state_of(out)).blocks == 2
    assert same_files(compiled(model, out, ids), whole(M4)) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Killed()], ids=["interrupt", "kill"])
def test_before_the_first_block_there_is_nothing_to_keep(
    error: BaseException, model: Path, ids: Path, tmp_path: Path
) -> None:
    with killed_after(1, error):
        compiled(model, tmp_path / "out", ids)
    assert not list(tmp_path.iterdir())


# other ends


def test_restart_discards_it(
    model: Path, ids: Path, whole: Callable[[str], Path], tmp_path: Path, ran: list[str]
) -> None:
    expected, out = whole(M4), tmp_path / "out"
    with killed_after(60, Killed()):
        compiled(model, out, ids)
    ran.clear()
    assert same_files(compiled(model, out, ids, restart=True), expected) and len(ran) == BLOCKS * RUNS[M4]


def test_what_needs_no_calibration_leaves_none_behind(model: Path, ids: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with killed_after(60, Killed()):
        compiled(model, out, ids)
    compiled(model, out, ids, "deepseek_w4a8_dynamic")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_at_once_are_refused(model: Path, ids: Path, tmp_path: Path) -> None:
    folder = state_of(tmp_path / "out").parent
    folder.mkdir()
    with locked(folder), pytest.raises(FxquantError, match="another fxquant process is using it"):
        compiled(model, tmp_path / "out", ids)
    assert folder.is_dir()


def test_a_fault_of_the_input_leaves_nothing(ids: Path, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", num_hidden_layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.self_attn.o_proj.weight"][3, 5] = torch.nan
    write_shards(folder, tensors)
    with pytest.raises(FxquantError, match="nan"):
        compiled(folder, tmp_path / "out", ids)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# a process that is killed


def compile_slowly(model: Path, out: Path, ids: Path) -> None:
    """Blocks take as long as if they were large."""
    save = CalibrationFolder.save

    def slowly(folder: CalibrationFolder, state: State) -> None:
        save(folder, state)
        time.sleep(0.2)

    CalibrationFolder.save = slowly  # type: ignore[method-assign]
    compiled(model, out, ids)


@pytest.mark.slow
def test_sigkill(model: Path, ids: Path, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """After each block that a run finishes."""
    expected, out, blocks = whole(M4), tmp_path / "out", []
    while not out.exists() and len(blocks) < 20:
        before = state_of(out).read_bytes() if state_of(out).is_file() else b""
        process = forked(partial(compile_slowly, model, out, ids))
        while process.is_alive() and not (state_of(out).is_file() and state_of(out).read_bytes() != before):
            time.sleep(0.002)
        if process.is_alive() and load_state(state_of(out)).blocks < BLOCKS * RUNS[M4]:
            process.kill()
            blocks.append(load_state(state_of(out)).blocks)
        process.join()
    assert blocks == list(range(1, BLOCKS * RUNS[M4])) and same_files(out, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
