"""The last steps of an output, stopped at each: the same command completes, and what is said is true."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from finishing import ONE, Made, case, complete, selected, steps, written
from output_folders import same_files
from stops import killed_at, raising_at, watched

from fxquant import FxquantError
from fxquant.errors import StoppedError
from fxquant.lowering.destination import open_destination
from fxquant.lowering.finish import Places, State
from fxquant.lowering.output import write_output
from fxquant.progress import silent

__all__ = ["case"]


def killed_everywhere(case: Made, tmp_path: Path, replaced: bool, force: bool, some: bool) -> dict[State, int]:
    """Kill at operations of the last steps, look, and run the same command again; how often each state was left."""
    contents, whole, earlier = case
    done = steps(case, tmp_path / "steps", replaced)
    seen: dict[State, int] = {}
    for at in selected(done) if some else range(len(done)):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        out = folder / "out"
        assert killed_at(at, complete(case, out, replaced)), (at, done)
        places = Places(out)
        state = places.state
        seen[state] = seen.get(state, 0) + 1
        there = same_files(out, whole) if state in (State.NAMED, State.NONE) else not out.exists()
        assert there or (state is State.UNFINISHED and replaced and same_files(out, earlier)), (at, state)
        assert state is not State.ASIDE or same_files(places.replaced, earlier)
        if not force and state in (State.NONE, State.UNFINISHED) and out.exists():
            with pytest.raises(FxquantError, match="exists and is not empty"):
                written(contents, out)
            assert same_files(out, whole) or same_files(out, earlier)
            if state is State.NONE:
                assert [path.name for path in folder.iterdir()] == ["out"]
        else:
            written(contents, out, force)
            assert same_files(out, whole) and [path.name for path in folder.iterdir()] == ["out"], (at, state)
        shutil.rmtree(folder)
    return seen


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_killed_where_the_states_change_the_same_command_completes(
    replaced: bool, force: bool, case: Made, tmp_path: Path
) -> None:
    seen = killed_everywhere(case, tmp_path, replaced, force, some=True)
    assert set(seen) == set(State) - (set() if replaced else {State.ASIDE})


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_killed_at_every_operation_the_same_command_completes(
    replaced: bool, force: bool, case: Made, tmp_path: Path
) -> None:
    seen = killed_everywhere(case, tmp_path, replaced, force, some=False)
    print(seen)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=["interrupt", "error"]
)
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopped_at_any_operation_what_is_said_is_true(
    every: bool, replaced: bool, error: BaseException, case: Made, tmp_path: Path
) -> None:
    contents, whole, earlier = case
    done = steps(case, tmp_path / "steps", replaced)
    for at in range(len(done)) if every else selected(done):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        out, end = folder / "out", complete(case, folder / "out", replaced)
        with watched(raising_at(at, error)), pytest.raises((KeyboardInterrupt, StoppedError)) as caught:
            end()
        state, said = Places(out).state, vars(caught.value)["state"]
        assert "\n" not in said
        if isinstance(error, OSError):
            assert "Input/output error" in str(caught.value) and caught.value.remedy
        if out.exists() and same_files(out, whole):
            assert f"The output is complete: {out}." in said, (at, said)
        elif replaced:  # an error is answered: the earlier output has its name again
            assert same_files(out, earlier) and f"{out} is as it was." in said, (at, said)
        else:
            assert not out.exists() and f"Nothing was left at {out}." in said, (at, said)
        if state is State.UNFINISHED:
            assert f"kept in {Places(out).work.path}: the same command resumes it" in said
        shutil.rmtree(folder)


def test_a_stop_after_the_end_says_that_it_is_complete(case: Made, tmp_path: Path) -> None:
    destination = open_destination(tmp_path / "out", False, [])
    with pytest.raises(KeyboardInterrupt) as caught, destination.telling():
        with write_output(case[0], destination, ONE, silent):
            pass
        raise KeyboardInterrupt
    assert vars(caught.value)["state"] == f"The output is complete: {tmp_path / 'out'}."


def test_before_the_end_an_interrupt_says_what_is_kept(case: Made, tmp_path: Path) -> None:
    for out, begun in ((tmp_path / "a", True), (tmp_path / "b", False)):
        destination = open_destination(out, False, [])
        with pytest.raises(KeyboardInterrupt) as caught, destination.telling():
            if begun:
                with write_output(case[0], destination, ONE, silent):
                    raise KeyboardInterrupt
            raise KeyboardInterrupt
        said = vars(caught.value)["state"]
        assert said.startswith(f"Nothing was left at {out}. ") and said.endswith(
            f"kept in {out}.partial: the same command resumes it." if begun else "The same command starts again."
        )
