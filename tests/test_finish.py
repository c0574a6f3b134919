"""The last steps of an output, stopped at each: the same command completes, and what is said is true."""

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from output_folders import POLICY, same_files
from stops import killed_at, raising_at, watched
from tiny import write_checkpoint

from fxquant import CompileOptions, FxquantError
from fxquant.api import _contents
from fxquant.errors import StoppedError
from fxquant.frontend.source import open_source
from fxquant.lowering.destination import Destination, open_destination
from fxquant.lowering.finish import Places, State, give_name
from fxquant.lowering.output import Contents, Work, write_output
from fxquant.lowering.weights.journal import go_on
from fxquant.lowering.weights.work import Workers
from fxquant.lowering.workspace import Workspace
from fxquant.policy import load_policy
from fxquant.preparation import prepare
from fxquant.progress import silent

ONE = Work(Workers(jobs=1))
Made = tuple[Contents, Path, Path]


class Stopped(BaseException):
    """An end just before the last steps."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """What an output is made of, the output, and an earlier one of other contents."""
    base = tmp_path_factory.mktemp("finish")
    shape = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_hidden_layers": 1}
    source = open_source(write_checkpoint(base / "model", **shape))
    options = CompileOptions(POLICY, export=False)
    contents = _contents(prepare(source, load_policy(POLICY), options), options)
    written(contents, base / "whole")
    written(replace(contents, tp=2), base / "earlier")
    return contents, base / "whole", base / "earlier"


def written(contents: Contents, out: Path, force: bool = False, work: Work = ONE) -> Path:
    """What a command does with `out`."""
    destination = open_destination(out, force, [])
    with destination.telling(), write_output(contents, destination, work, silent):
        pass
    return out


def complete(made: Made, out: Path, replaced: bool) -> Callable[[], object]:
    """Work on `out` that is complete and has no name yet; call what is given to have the last steps done."""
    contents, _, earlier = made
    if replaced:
        shutil.copytree(earlier, out)
    destination = open_destination(out, replaced, [])
    with pytest.raises(Stopped), write_output(contents, destination, ONE, silent):
        raise Stopped
    return partial(last_steps, contents, destination)


def last_steps(contents: Contents, destination: Destination) -> None:
    with destination.telling(), destination.places.work.held():
        journal = go_on(destination.places.journal)
        space = Workspace(destination, owned=True, resumable=True)
        space.finish(journal, contents.identity(destination.out), lambda: None)


def steps(made: Made, folder: Path, replaced: bool) -> list[str]:
    """The operations of the last steps."""
    folder.mkdir()
    end = complete(made, folder / "out", replaced)
    with watched(lambda number, name: None) as done:
        end()
    return done


def chosen(done: list[str]) -> list[int]:
    """The first, the last and every rename, with what comes after it: the states change there."""
    around = {at + more for at, name in enumerate(done) if name in ("rename", "rmdir") for more in (0, 1)}
    return sorted({0, len(done) - 1, *around} & set(range(len(done))))


def killed_everywhere(made: Made, tmp_path: Path, replaced: bool, force: bool, some: bool) -> dict[State, int]:
    """Kill at operations of the last steps, look, and run the same command again; how often each state was left."""
    contents, whole, earlier = made
    done = steps(made, tmp_path / "steps", replaced)
    seen: dict[State, int] = {}
    for at in chosen(done) if some else range(len(done)):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        out = folder / "out"
        assert killed_at(at, complete(made, out, replaced)), (at, done)
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
    replaced: bool, force: bool, made: Made, tmp_path: Path
) -> None:
    seen = killed_everywhere(made, tmp_path, replaced, force, some=True)
    assert set(seen) == set(State) - (set() if replaced else {State.ASIDE})


@pytest.mark.slow
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("force", [True, False])
def test_killed_at_every_operation_the_same_command_completes(
    replaced: bool, force: bool, made: Made, tmp_path: Path
) -> None:
    seen = killed_everywhere(made, tmp_path, replaced, force, some=False)
    print(seen)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.EIO, os.strerror(errno.EIO))], ids=["interrupt", "error"]
)
@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_stopped_at_any_operation_what_is_said_is_true(
    every: bool, replaced: bool, error: BaseException, made: Made, tmp_path: Path
) -> None:
    contents, whole, earlier = made
    done = steps(made, tmp_path / "steps", replaced)
    for at in range(len(done)) if every else chosen(done):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        out, end = folder / "out", complete(made, folder / "out", replaced)
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
            assert f"kept in {Places(out).work.path}: the same command goes on" in said
        shutil.rmtree(folder)


def test_a_stop_after_the_end_says_that_it_is_complete(made: Made, tmp_path: Path) -> None:
    destination = open_destination(tmp_path / "out", False, [])
    with pytest.raises(KeyboardInterrupt) as caught, destination.telling():
        with write_output(made[0], destination, ONE, silent):
            pass
        raise KeyboardInterrupt
    assert vars(caught.value)["state"] == f"The output is complete: {tmp_path / 'out'}."


def test_before_the_end_an_interrupt_says_what_is_kept(made: Made, tmp_path: Path) -> None:
    for out, begun in ((tmp_path / "a", True), (tmp_path / "b", False)):
        destination = open_destination(out, False, [])
        with pytest.raises(KeyboardInterrupt) as caught, destination.telling():
            if begun:
                with write_output(made[0], destination, ONE, silent):
                    raise KeyboardInterrupt
            raise KeyboardInterrupt
        said = vars(caught.value)["state"]
        assert said.startswith(f"Nothing was left at {out}. ") and said.endswith(
            f"kept in {out}.partial: the same command goes on with it." if begun else "The same command begins anew."
        )


# states that a stop leaves, and other commands


def named(made: Made, out: Path) -> None:
    """`out` has its name, and all else is still there."""
    end = complete(made, out, replaced=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("fxquant.lowering.workspace.sweep", raises)
        end()
    assert Places(out).state is State.NAMED and Places(out).replaced.is_dir()


def aside(made: Made, out: Path) -> None:
    """The earlier output has lost its name, the new one has not got it."""
    complete(made, out, replaced=True)
    out.rename(Places(out).replaced)
    assert Places(out).state is State.ASIDE


def raises(*arguments: object) -> None:
    raise Stopped


def test_with_its_name_other_work_says_that_it_exists_and_force_replaces_it(made: Made, tmp_path: Path) -> None:
    contents, whole, earlier = made
    other, out = replace(contents, tp=2), tmp_path / "out"
    named(made, out)
    with pytest.raises(FxquantError, match="exists and is not empty"):
        written(other, out)
    assert same_files(out, whole)
    written(other, out, force=True)
    assert same_files(out, earlier) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("restart", [True, False])
def test_with_its_name_nothing_is_made_again(
    restart: bool, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    named(made, out)
    monkeypatch.setattr("fxquant.lowering.output.write_weights", lambda *arguments: pytest.fail("work began"))
    destination = open_destination(out, False, [])
    with write_output(made[0], destination, replace(ONE, restart=restart), silent) as output:
        assert output.folder == out
    assert "was complete" in output.notes[0] and output.work.resumed > 0
    assert same_files(out, made[1]) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_aside_restart_gives_the_name_back(made: Made, tmp_path: Path) -> None:
    contents, whole, earlier = made
    out = tmp_path / "out"
    aside(made, out)
    destination = open_destination(out, False, [])
    with pytest.raises(Stopped), write_output(contents, destination, replace(ONE, restart=True), silent):
        assert same_files(out, earlier)
        raise Stopped
    written(contents, out, force=True)
    assert same_files(out, whole) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_aside_other_work_is_refused_and_nothing_is_lost(made: Made, tmp_path: Path) -> None:
    contents, _, earlier = made
    out = tmp_path / "out"
    aside(made, out)
    with pytest.raises(FxquantError, match="holds unfinished work under policy") as caught:
        written(replace(contents, policy="another"), out)
    assert str(Places(out).replaced) in caught.value.state and same_files(Places(out).replaced, earlier)


def test_aside_a_fault_gives_the_name_back(made: Made, tmp_path: Path) -> None:
    """As verification that finds something."""
    out = tmp_path / "out"
    aside(made, out)
    with (
        pytest.raises(FxquantError, match="verification"),
        write_output(made[0], open_destination(out, False, []), ONE, silent),
    ):
        raise FxquantError(out, "verification failed.")
    assert same_files(out, made[2]) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [True, False])
def test_what_comes_to_the_name_meanwhile_is_not_replaced(force: bool, made: Made, tmp_path: Path) -> None:
    out, contents = tmp_path / "out", made[0]
    with (
        pytest.raises(StoppedError, match="not of this output|come to be there|not an output") as caught,
        write_output(contents, open_destination(out, force, []), ONE, silent),
    ):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work" and "kept in" in caught.value.remedy
    shutil.rmtree(out)
    assert same_files(written(contents, out), made[1])


def test_what_is_put_into_the_earlier_output_meanwhile_is_not_lost(made: Made, tmp_path: Path) -> None:
    out = Path(shutil.copytree(made[2], tmp_path / "out"))
    with (
        pytest.raises(StoppedError, match=r"not of this output: thesis.txt"),
        write_output(made[0], open_destination(out, True, []), ONE, silent),
    ):
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    assert same_files(written(made[0], out, force=True), made[1])


def test_two_earlier_outputs_are_both_kept(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    complete(made, out, replaced=True)
    places = Places(out)
    shutil.copytree(out, places.replaced)
    with pytest.raises(StoppedError, match="holds an earlier output, and so does"):
        give_name(places, force=True)
    assert same_files(out, made[2]) and same_files(places.replaced, made[2])


def test_an_empty_folder_of_the_name_is_taken(made: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert same_files(written(made[0], tmp_path / "out"), made[1])
