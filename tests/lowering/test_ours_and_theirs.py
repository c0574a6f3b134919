"""Work folders are ours by a marker, files of an output by its manifest; whatever else is there is left alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
from forced import Untouched, output, refused, untouched
from output_folders import POLICY, files_of
from tiny import write_checkpoint

from fxquant import CompileOptions, FxquantError, compile
from fxquant.lowering.destination import open_destination
from fxquant.lowering.output_folder.manifest import MANIFEST, Manifest
from fxquant.storage.work_folder import MARKER, Kind, WorkFolder

__all__ = ["untouched"]
KINDS = [*Kind]


# ours and theirs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("force", [True, False])
def test_a_work_folder_without_our_marker_is_somebodys(
    kind: Kind, force: bool, tmp_path: Path, untouched: Untouched
) -> None:
    theirs = tmp_path / f"out.{kind}"
    (theirs / "files").mkdir(parents=True)
    (theirs / "files" / "thesis.txt").write_text("years of work")
    untouched()
    refused(tmp_path / "out", theirs.name, "was not made by fxquant", "files", force=force)


@pytest.mark.parametrize("restart", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_before_the_model_is_opened(
    kind: Kind, restart: bool, tmp_path: Path, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"out.{kind}").mkdir()
    (tmp_path / f"out.{kind}" / "mine").write_text("mine")
    untouched()
    monkeypatch.setattr("fxquant.verbs.compile.open_model", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(FxquantError, match="was not made by fxquant for this output: mine"):
        compile(tmp_path / "model", CompileOptions(policy=POLICY, out=tmp_path / "out", force=True, restart=restart))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("there", ["a folder", "nothing", "a file"])
def test_a_link_of_a_work_folders_name_is_not_followed(
    kind: Kind, there: str, tmp_path: Path, untouched: Untouched
) -> None:
    data = tmp_path / "data"
    if there == "a folder":
        data.mkdir()
        (data / "thesis.txt").write_text("years of work")
        (data / MARKER).write_bytes(WorkFolder(tmp_path / "out", kind).marker)
    elif there == "a file":
        data.write_text("years of work")
    (tmp_path / f"out.{kind}").symlink_to(data)
    untouched()
    refused(tmp_path / "out", f"out.{kind}", "a file or a link")


@pytest.mark.parametrize("kind", KINDS)
def test_the_marker_of_another_output_is_not_ours(kind: Kind, tmp_path: Path, untouched: Untouched) -> None:
    folder = tmp_path / f"out.{kind}"
    folder.mkdir()
    (folder / MARKER).write_bytes(WorkFolder(tmp_path / "other", kind).marker)
    untouched()
    refused(tmp_path / "out", "was not made by fxquant for this output")


def test_what_was_put_into_our_work_folder_is_named(tmp_path: Path, untouched: Untouched) -> None:
    work = WorkFolder(tmp_path / "out", Kind.PARTIAL)
    with work.held():
        (work.path / "notes.txt").write_text("mine")
    untouched()
    refused(tmp_path / "out", "notes.txt", "fxquant did not write")


def test_a_link_deep_in_our_work_folder_is_named_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    work = WorkFolder(tmp_path / "out", Kind.PARTIAL)
    with work.held():
        (work.path / "files").mkdir()
        (work.path / "files" / "optional").symlink_to(tmp_path / "data")
    with pytest.raises(FxquantError, match="files/optional"), work.held():
        pass
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left", [0, 1, 40])
def test_an_empty_folder_and_a_cut_off_marker_are_nobodys(kind: Kind, left: int, tmp_path: Path) -> None:
    """What a kill between making the folder and marking it leaves."""
    work = WorkFolder(tmp_path / "out", kind)
    work.path.mkdir()
    if left:
        (work.path / MARKER).write_bytes(work.marker[: left - 1])
    assert work.check()
    with work.held():
        assert (work.path / MARKER).read_bytes() == work.marker
    work.remove()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_user_called_replaced_has_nothing_to_do_with_us(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "thesis.txt").write_text("years of work")
    options = CompileOptions(policy=POLICY, out=tmp_path / "out", verify=False, export=False, force=True)
    for _ in range(2):
        compile(tiny_model, options)
    assert files_of(tmp_path / "out.replaced") == {"thesis.txt": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.replaced"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model", **shape)


# what lies in an output


OTHERS: dict[str, Callable[[Path], object]] = {
    "thesis.txt": lambda out: (out / "thesis.txt").write_text("years of work"),
    "optional/notes.txt": lambda out: (out / "optional" / "notes.txt").write_text("mine"),
    "data": lambda out: (out / "data").mkdir(),
    "more": lambda out: [(out / "more").mkdir(), (out / "more" / "x").write_text("mine")],
    "link": lambda out: (out / "link").symlink_to(out.parent),
    "model_ascend.py": lambda out: [
        (out / "model_ascend.py").rename(out.parent / "elsewhere"),
        (out / "model_ascend.py").symlink_to(out.parent / "elsewhere"),
    ],
    "__pycache__/mine.cpython-311.pyc": lambda out: [
        (out / "__pycache__").mkdir(),
        (out / "__pycache__" / "mine.cpython-311.pyc").write_text("mine"),
    ],
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_the_outputs_is_named_and_left_alone(name: str, tmp_path: Path, untouched: Untouched) -> None:
    OTHERS[name](output(tmp_path / "out"))
    untouched()
    refused(tmp_path / "out", name, "not part of this output", "Move it elsewhere")


def test_an_output_and_pythons_cache_of_its_own_module_are_replaced(tmp_path: Path) -> None:
    out = output(tmp_path / "out")
    (out / "__pycache__").mkdir()
    (out / "__pycache__" / "model_ascend.cpython-311.pyc").write_text("")
    assert open_destination(out, True, []).out == out


PATHS = ["../thesis.txt", "/etc/passwd", "optional/../../thesis.txt", "./x", "", "a//b", ".", "..", "x\0y"]


@pytest.mark.parametrize("path", PATHS)
def test_a_manifest_that_lists_what_is_elsewhere_is_refused(path: str, tmp_path: Path, untouched: Untouched) -> None:
    out = output(tmp_path / "out")
    manifest = Manifest.model_validate_json((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(manifest.model_copy(update={"files": {path: 1}}).model_dump_json())
    (tmp_path / "thesis.txt").write_text("years of work")
    untouched()
    refused(out, MANIFEST)


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "\ufeff", '{"files": {"x": "y"}}', "[" * 5000])
def test_a_manifest_that_cannot_be_read_says_nothing_is_ours(text: str, tmp_path: Path, untouched: Untouched) -> None:
    (output(tmp_path / "out") / MANIFEST).write_text(text)
    untouched()
    refused(tmp_path / "out", MANIFEST)


@pytest.mark.parametrize("left", ["nothing", "a marker"])
def test_the_last_that_a_killed_command_leaves_goes_with_the_next(left: str, tmp_path: Path) -> None:
    """Its output is complete, and there; without --force that is what the next one says."""
    work = WorkFolder(output(tmp_path / "out"), Kind.PARTIAL)
    work.path.mkdir()
    if left == "a marker":
        (work.path / MARKER).write_bytes(work.marker)
    refused(tmp_path / "out", "exists and is not empty", "--force", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
