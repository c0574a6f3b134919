"""What a stop in the last steps of an output leaves, met by other commands, and what comes to be there meanwhile."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from finishing import ONE, Made, Stopped, case, complete, written
from output_folders import same_files

from fxquant import FxquantError
from fxquant.engines.serving import RankLayout
from fxquant.errors import StoppedError
from fxquant.lowering.destination import open_destination
from fxquant.lowering.finish import Places, State, give_name
from fxquant.lowering.output import write_output
from fxquant.progress import silent

__all__ = ["case"]


def named(case: Made, out: Path) -> None:
    """`out` has its name, and all else is still there."""
    end = complete(case, out, replaced=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr("fxquant.lowering.workspace.sweep", raises)
        end()
    assert Places(out).state is State.NAMED and Places(out).replaced.is_dir()


def aside(case: Made, out: Path) -> None:
    """The earlier output has lost its name, the new one has not got it."""
    complete(case, out, replaced=True)
    out.rename(Places(out).replaced)
    assert Places(out).state is State.ASIDE


def raises(*arguments: object) -> None:
    raise Stopped


def test_with_its_name_other_work_says_that_it_exists_and_force_replaces_it(case: Made, tmp_path: Path) -> None:
    contents, whole, earlier = case
    other, out = replace(contents, layout=RankLayout(2)), tmp_path / "out"
    named(case, out)
    with pytest.raises(FxquantError, match="exists and is not empty"):
        written(other, out)
    assert same_files(out, whole)
    written(other, out, force=True)
    assert same_files(out, earlier) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("restart", [True, False])
def test_with_its_name_nothing_is_made_again(
    restart: bool, case: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    named(case, out)
    monkeypatch.setattr("fxquant.lowering.output.write_weights", lambda *arguments: pytest.fail("work began"))
    destination = open_destination(out, False, [])
    with write_output(case[0], destination, replace(ONE, restart=restart), silent) as output:
        assert output.folder == out
    assert "was complete" in output.notes[0] and output.work.resumed > 0
    assert same_files(out, case[1]) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_aside_restart_gives_the_name_back(case: Made, tmp_path: Path) -> None:
    contents, whole, earlier = case
    out = tmp_path / "out"
    aside(case, out)
    destination = open_destination(out, False, [])
    with pytest.raises(Stopped), write_output(contents, destination, replace(ONE, restart=True), silent):
        assert same_files(out, earlier)
        raise Stopped
    written(contents, out, force=True)
    assert same_files(out, whole) and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_aside_other_work_is_refused_and_nothing_is_lost(case: Made, tmp_path: Path) -> None:
    contents, _, earlier = case
    out = tmp_path / "out"
    aside(case, out)
    with pytest.raises(FxquantError, match="holds unfinished work under policy") as caught:
        written(replace(contents, policy="another"), out)
    assert str(Places(out).replaced) in caught.value.state and same_files(Places(out).replaced, earlier)


def test_aside_a_fault_gives_the_name_back(case: Made, tmp_path: Path) -> None:
    """As verification that finds something."""
    out = tmp_path / "out"
    aside(case, out)
    with (
        pytest.raises(FxquantError, match="verification"),
        write_output(case[0], open_destination(out, False, []), ONE, silent),
    ):
        raise FxquantError(out, "verification failed.")
    assert same_files(out, case[2]) and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [True, False])
def test_what_comes_to_the_name_meanwhile_is_not_replaced(force: bool, case: Made, tmp_path: Path) -> None:
    out, contents = tmp_path / "out", case[0]
    with (
        pytest.raises(StoppedError, match="not part of this output|appeared while|not an output") as caught,
        write_output(contents, open_destination(out, force, []), ONE, silent),
    ):
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work" and "kept in" in caught.value.remedy
    shutil.rmtree(out)
    assert same_files(written(contents, out), case[1])


def test_what_is_put_into_the_earlier_output_meanwhile_is_not_lost(case: Made, tmp_path: Path) -> None:
    out = Path(shutil.copytree(case[2], tmp_path / "out"))
    with (
        pytest.raises(StoppedError, match=r"not part of this output: thesis.txt"),
        write_output(case[0], open_destination(out, True, []), ONE, silent),
    ):
        (out / "thesis.txt").write_text("years of work")
    assert (out / "thesis.txt").read_text() == "years of work"
    (out / "thesis.txt").unlink()
    assert same_files(written(case[0], out, force=True), case[1])


def test_two_earlier_outputs_are_both_kept(case: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    complete(case, out, replaced=True)
    places = Places(out)
    shutil.copytree(out, places.replaced)
    with pytest.raises(StoppedError, match="holds an earlier output, and so does"):
        give_name(places, force=True)
    assert same_files(out, case[2]) and same_files(places.replaced, case[2])


def test_an_empty_folder_of_the_name_is_taken(case: Made, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert same_files(written(case[0], tmp_path / "out"), case[1])
