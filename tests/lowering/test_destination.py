"""`-o`: what can't become an output is refused before any work."""

import errno
import os
from pathlib import Path

import pytest
from forced import Untouched, output, refused, untouched
from output_folders import POLICY
from tiny import write_checkpoint

from fxquant import CompileOptions, FxquantError, compile
from fxquant.errors import StoppedError
from fxquant.lowering.destination import Input, open_destination
from fxquant.lowering.finish import Places
from fxquant.lowering.output_folder.manifest import MANIFEST, Manifest

__all__ = ["untouched"]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"n_routed_experts": 2, "n_group": 1, "topk_group": 1}
    return write_checkpoint(tmp_path_factory.mktemp("model") / "model", **shape)


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
    refused(
        tmp_path / "model" / "out", "is inside the checkpoint", inputs=(Input("the checkpoint", tmp_path / "model"),)
    )


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
    monkeypatch.setattr("fxquant.verbs.compile.open_model", lambda *arguments: pytest.fail("work began"))
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
        compile(source, CompileOptions(policy=POLICY, out=out, verify=False, export=False, force=True))


def test_weights_that_links_lead_to_are_inputs(tmp_path: Path, untouched: Untouched) -> None:
    """As in the cache of a hub: the folder has links, the files lie elsewhere."""
    source, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    output(out, ("model.safetensors",))
    (out / "model.safetensors").unlink()
    (source / "model.safetensors").rename(out / "model.safetensors")
    (source / "model.safetensors").symlink_to(out / "model.safetensors")
    untouched()
    with pytest.raises(FxquantError, match="contains a weight file"):
        compile(source, CompileOptions(policy=POLICY, out=out, verify=False, export=False, force=True))


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
        report = compile(tiny_model, CompileOptions(policy=POLICY, out=link, verify=False, export=False, force=force))
    assert report.out == link and link.is_symlink() and (tmp_path / "large" / "real" / MANIFEST).is_file()
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "large").iterdir()] == ["real"]


def test_a_link_to_nothing_is_refused_at_once(tmp_path: Path, untouched: Untouched) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    untouched()
    refused(tmp_path / "out", "is a link to", "gone, which does not exist")


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
    monkeypatch.setattr("fxquant.verbs.compile.open_model", lambda *arguments: pytest.fail("work began"))
    for out in (tmp_path / "out", tmp_path / "new" / "out"):
        with pytest.raises(StoppedError, match=ERRORS[code]) as caught:
            compile(tmp_path / "model", CompileOptions(policy=POLICY, out=out))
        assert caught.value.remedy


def test_missing_parents_are_made_and_said(tmp_path: Path, tiny_model: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    report = compile(tiny_model, CompileOptions(policy=POLICY, out=out, verify=False, export=False))
    assert report.notes == [f"made the folder {tmp_path / 'a'} for the output"] and out.is_dir()
    assert (
        compile(tiny_model, CompileOptions(policy=POLICY, out=tmp_path / "x", verify=False, export=False)).notes == []
    )


def test_after_a_fault_no_parents_stay(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="no such file"):
        compile(tmp_path / "model", CompileOptions(policy=POLICY, out=tmp_path / "a" / "b" / "out"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_of_asking(tmp_path: Path) -> None:
    open_destination(tmp_path / "out", False, [])
    assert not list(tmp_path.iterdir()) and Places(tmp_path / "out").state == "none"


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
