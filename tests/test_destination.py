"""`-o` and what is beside it: what can't become an output, or belongs to somebody, is refused before any work."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from output_folders import POLICY, files_of
from tiny import write_checkpoint

from fxquant import CompileOptions, FxquantError, compile
from fxquant.errors import StoppedError
from fxquant.lowering.destination import Input, open_destination
from fxquant.lowering.finish import Places
from fxquant.lowering.manifest import MANIFEST, STAMPS, Manifest
from fxquant.work_folder import MARKER, Kind, WorkFolder

KINDS = [*Kind]


def output(folder: Path, files: tuple[str, ...] = ("model_ascend.py", "optional/calibration.safetensors")) -> Path:
    """A folder with the manifest of an output, and the files that it lists."""
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    manifest = Manifest(
        fxquant="0.1.0", kernels=1, source="../model", checkpoint="../model", policy=POLICY, target="ascend",
        sources={}, files={name: len(name) for name in files}, digests=dict.fromkeys(files, "0" * 32), weights={},
        units={},
    )  # fmt: skip
    (folder / MANIFEST).write_text(manifest.model_dump_json())
    (folder / STAMPS).write_text("{}")
    return folder


@pytest.fixture
def untouched(tmp_path: Path) -> Iterator[None]:
    """Whatever the test put into `tmp_path` is there afterwards as it was: names, bytes, links, empty folders."""

    def everything() -> dict[str, object]:
        return {
            str(path): path.readlink() if path.is_symlink() else path.is_dir() or path.read_bytes()
            for path in tmp_path.rglob("*")
        }

    seen: list[dict[str, object]] = []
    yield lambda: seen.append(everything())  # type: ignore[misc]
    assert seen and everything() == seen[0]


Untouched = Callable[[], object]


def refused(out: Path, *words: str, force: bool = True, inputs: tuple[Input, ...] = ()) -> FxquantError:
    with pytest.raises(FxquantError) as caught:
        open_destination(out, force, inputs)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.remedy
    return caught.value


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
    monkeypatch.setattr("fxquant.api.open_model", lambda *arguments: pytest.fail("work began"))
    with pytest.raises(FxquantError, match="was not made by fxquant for this output: mine"):
        compile(tmp_path / "model", CompileOptions(POLICY, tmp_path / "out", force=True, restart=restart))


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
    refused(tmp_path / "out", "notes.txt", "fxquant did not put there")


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
    options = CompileOptions(POLICY, tmp_path / "out", verify=False, export=False, force=True)
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
    refused(tmp_path / "out", name, "not of this output", "Move it elsewhere")


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


# inputs


@pytest.mark.parametrize("inside", ["out", "out/model", "out.partial", "out.calibrating/model", "out.partial/a/b"])
def test_an_input_in_what_would_be_deleted_is_refused(inside: str, tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / inside).mkdir(parents=True)
    untouched()
    refused(tmp_path / "out", "--calib", inputs=(Input("--calib", tmp_path / inside),))


def test_an_input_in_an_output_by_way_of_a_link(tmp_path: Path, untouched: Untouched) -> None:
    out = output(tmp_path / "out")
    (tmp_path / "text").symlink_to(out / "optional" / "calibration.safetensors")
    untouched()
    refused(out, "contains --calibration", inputs=(Input("--calibration", tmp_path / "text"),))


def test_work_folders_in_an_input_are_refused(tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / "model").mkdir()
    untouched()
    refused(tmp_path / "model" / "out", "lies in the checkpoint", inputs=(Input("the checkpoint", tmp_path / "model"),))


def test_the_output_that_is_replaced_may_be_reused(tmp_path: Path) -> None:
    out = output(tmp_path / "out")
    assert open_destination(out, True, [Input("--reuse", out, replaced=True)]).force
    refused(out, "is the checkpoint itself", inputs=(Input("the checkpoint", out),))


@pytest.mark.parametrize("what", ["model", "calib", "calibration", "policy", "reuse", "checkpoint"])
def test_compile_knows_all_its_inputs(
    what: str, tmp_path: Path, untouched: Untouched, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = output(tmp_path / "out", ("mine.yaml",))
    untouched()
    monkeypatch.setattr("fxquant.api.open_model", lambda *arguments: pytest.fail("work began"))
    inside = out / "mine.yaml"
    options = {} if what == "model" else {what: str(inside)}
    with pytest.raises(FxquantError, match="contains"):
        compile(inside if what == "model" else tmp_path / "model", CompileOptions(out=out, force=True, **options))


def test_a_source_inside_the_output_is_kept(tmp_path: Path, tiny_model: Path, untouched: Untouched) -> None:
    """As the critical case was: a checkpoint in the folder that is forced."""
    out = output(tmp_path / "out")
    source = write_checkpoint(out / "model")
    untouched()
    with pytest.raises(FxquantError, match="contains the checkpoint"):
        compile(source, CompileOptions(POLICY, out, verify=False, export=False, force=True))


def test_weights_that_links_lead_to_are_inputs(tmp_path: Path, untouched: Untouched) -> None:
    """As in the cache of a hub: the folder has links, the files lie elsewhere."""
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    output(out, ("model.safetensors",))
    (out / "model.safetensors").unlink()
    (source / "model.safetensors").rename(out / "model.safetensors")
    (source / "model.safetensors").symlink_to(out / "model.safetensors")
    untouched()
    with pytest.raises(FxquantError, match="contains a weight file"):
        compile(source, CompileOptions(POLICY, out, verify=False, export=False, force=True))


# links, and places where nothing can be


def test_a_link_is_followed_once_and_stays(tmp_path: Path, tiny_model: Path) -> None:
    """Work is done beside its target: on the disk where there is room."""
    (tmp_path / "large").mkdir()
    (tmp_path / "small").mkdir()
    (tmp_path / "large" / "real").mkdir()
    link = tmp_path / "small" / "out"
    link.symlink_to(tmp_path / "large" / "real")
    places = open_destination(link, False, []).places
    assert places.work.path == tmp_path / "large" / "real.partial"
    for force in (False, True):
        report = compile(tiny_model, CompileOptions(POLICY, link, verify=False, export=False, force=force))
    assert report.out == link and link.is_symlink() and (tmp_path / "large" / "real" / MANIFEST).is_file()
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["real"]


def test_a_link_to_nothing_is_refused_at_once(tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    untouched()
    refused(tmp_path / "out", "a link to what is not there", "gone")


def test_links_in_a_circle(tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other").symlink_to(tmp_path / "out")
    untouched()
    refused(tmp_path / "out", "link")


@pytest.mark.parametrize("out", [".", "..", "", "../..", "sub/..", "./"])
def test_the_current_folder_and_those_around_it(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    refused(Path(out), "the current folder", "Choose a folder in it: -o")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "sub"]


@pytest.mark.parametrize("out", ["/", "/proc", "/dev/shm"])
def test_mount_points(out: str) -> None:
    refused(Path(out), "mount point" if out != "/" else "current folder")


def test_other_kinds_of_files(tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / "file").write_text("x")
    untouched()
    refused(tmp_path / "file", "exists and is a file")
    refused(Path("/dev/null"), "exists and is a file")
    refused(tmp_path / "file" / "out", "is a file")
    refused(tmp_path / "file" / "more" / "out", "is a file")


@pytest.mark.parametrize("length", [256, 250, 245])
def test_a_name_that_leaves_no_room_for_a_work_folders(length: int, tmp_path: Path) -> None:
    refused(tmp_path / ("n" * length), "File name too long", "shorter")
    assert not list(tmp_path.iterdir())


def test_a_name_with_a_zero_byte(tmp_path: Path) -> None:
    refused(tmp_path / "a\0b", "null byte")


ERRORS = {errno.EACCES: "Permission denied", errno.EROFS: "Read-only", errno.ENOSPC: "No space", errno.EDQUOT: "quota"}


@pytest.mark.parametrize("code", ERRORS)
def test_a_place_that_cannot_be_written_is_found_out_before_any_work(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another user, on another disk: the tests run as root."""

    def mkdir(path: object, *arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr("fxquant.api.open_model", lambda *arguments: pytest.fail("work began"))
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(StoppedError, match=ERRORS[code]) as caught:
            compile(tmp_path / "model", CompileOptions(POLICY, out))
        assert caught.value.remedy


def test_missing_parents_are_made_and_said(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    report = compile(tiny_model, CompileOptions(POLICY, out, verify=False, export=False))
    assert report.notes == [f"made the folder {tmp_path / 'a'} for the output"] and out.is_dir()
    assert compile(tiny_model, CompileOptions(POLICY, tmp_path / "x", verify=False, export=False)).notes == []


def test_after_a_fault_no_parents_stay(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="no such file"):
        compile(tmp_path / "model", CompileOptions(POLICY, tmp_path / "a" / "b" / "out"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_asking(tmp_path: Path) -> None:
    open_destination(tmp_path / "out", False, [])
    assert not list(tmp_path.iterdir()) and Places(tmp_path / "out").state == "none"


@pytest.mark.parametrize("left", ["nothing", "a marker"])
def test_the_last_that_a_killed_command_leaves_goes_with_the_next(left: str, tmp_path: Path) -> None:
    """Its output is complete, and there; without --force that is what the next one says."""
    work = WorkFolder(output(tmp_path / "out"), Kind.PARTIAL)
    work.path.mkdir()
    if left == "a marker":
        (work.path / MARKER).write_bytes(work.marker)
    refused(tmp_path / "out", "exists and is not empty", "--force", force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_way_through_a_missing_folder_is_the_same_way(tmp_path: Path, untouched: Untouched) -> None:
    output(tmp_path / "there")
    (tmp_path / "link").symlink_to(output(tmp_path / "elsewhere"))
    (output(tmp_path / "shared") / "notes.txt").write_text("mine")
    untouched()
    refused(tmp_path / "missing/../there", "exists and is not empty", force=False)
    refused(tmp_path / "missing/../shared", "notes.txt")
    destination = open_destination(tmp_path / "missing/../link", True, ())
    assert destination.out == tmp_path / "elsewhere"
    destination.forget()


def test_an_input_that_is_missing_is_told_at_once(tmp_path: Path, untouched: Untouched) -> None:
    untouched()
    refused(tmp_path / "out", "--calib", inputs=(Input("--calib", tmp_path / "text.jsonl"),))


def test_a_file_that_only_the_list_of_files_names_is_not_ours(tmp_path: Path, untouched: Untouched) -> None:
    folder = output(tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_text())
    listed = manifest.model_copy(update={"files": manifest.files | {"notes.txt": 4}})
    (folder / MANIFEST).write_text(listed.model_dump_json())
    untouched()
    refused(folder, "notes.txt")
