"""What the operating system refuses, wherever it does: one error with the file and the reason, nothing lost."""

import errno
import io
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from finishing import ONE, POLICY, Made, Stopped, case, selected, written
from output_folders import files_of, same_files
from stops import OPERATIONS, raising_at, watched

from fxquant import CompileOptions, FxquantError, compile
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.calibration.resume_folder import CalibrationFolder
from fxquant.errors import StoppedError
from fxquant.lowering.destination import open_destination
from fxquant.lowering.finish import Places, State
from fxquant.lowering.output import write_output
from fxquant.progress import silent
from fxquant.storage.system_errors import REMEDIES, stopped
from fxquant.storage.work_folder import MARKER, Kind, WorkFolder

__all__ = ["case"]
ALL = (*OPERATIONS, "open", "write", "pwrite", "posix_fallocate", "scandir", "listdir", "lstat")


def system(code: int, path: object = None) -> OSError:
    return OSError(code, os.strerror(code), None if path is None else str(path))


def begun(case: Made, out: Path) -> None:
    """Unfinished work on `out`, to be discarded."""
    with pytest.raises(Stopped), write_output(case[0], open_destination(out, False, []), ONE, silent):
        raise Stopped


def restarted(case: Made, out: Path) -> None:
    destination = open_destination(out, False, [])
    with destination.telling(), write_output(case[0], destination, replace(ONE, restart=True), silent):
        pass


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_refused_at_any_operation_it_is_one_error_and_the_same_command_completes(
    code: int, every: bool, case: Made, tmp_path: Path
) -> None:
    """Work folders are probed, discarded, made and marked, files reserved, filled and synced, names given."""
    names = ALL if every else OPERATIONS
    out = tmp_path / "work" / "out"
    begun(case, out)
    shutil.copytree(out.parent, tmp_path / "begun")
    with watched(lambda number, name: None, names) as done:
        restarted(case, out)
    for at in range(len(done)) if every else selected(done):
        shutil.rmtree(out.parent)
        shutil.copytree(tmp_path / "begun", out.parent)
        try:
            with watched(raising_at(at, system(code)), names):
                restarted(case, out)
        except StoppedError as error:
            assert os.strerror(code) in error.fact and error.remedy and error.place, (at, done[at])
            assert error.place.startswith((str(tmp_path), str(case[0].source))), (error.place, done[at])
            assert "\n" not in error.state
        except FxquantError as error:
            pytest.fail(f"{done[at]}: {error}")
        if out.exists() and Places(out).state is State.NONE:  # it was complete
            with pytest.raises(FxquantError, match="exists and is not empty"):
                written(case[0], out)
        else:
            written(case[0], out)
        assert same_files(out, case[1]) and [path.name for path in out.parent.iterdir()] == ["out"], (at, done[at])


# before there is work


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_marker_that_cannot_be_written_leaves_no_folder(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> None:
        raise system(code)

    monkeypatch.setattr(os, call, fails)
    for kind in Kind:
        work = WorkFolder(tmp_path / "out", kind)
        with pytest.raises(StoppedError, match=os.strerror(code)) as caught, work.held():
            pass
        assert caught.value.place == str(work.path / MARKER) and not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> None:
        raise system(errno.ENOLCK)

    monkeypatch.setattr("fcntl.flock", fails)
    with pytest.raises(StoppedError, match="cannot be locked: No locks available"):
        WorkFolder(tmp_path / "out", Kind.PARTIAL).held().__enter__()


def test_a_folder_that_another_removed_while_we_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = WorkFolder(tmp_path / "out", Kind.PARTIAL)

    def flock(handle: int, how: int) -> None:
        shutil.rmtree(work.path)

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(FxquantError, match="another fxquant process is using it"):
        work.held().__enter__()


@pytest.mark.parametrize("kind", Kind)
def test_a_work_folder_that_cannot_be_cleared_or_listed(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path / "out", kind)
    inner = "files" if kind is Kind.PARTIAL else "codes"
    with work.held():
        (work.path / inner).mkdir()
        (work.path / inner / "x").write_text("x")
    for call in ("unlink", "rmdir", "scandir", "listdir"):
        with monkeypatch.context() as patch:
            original = getattr(os, call)

            def fails(path: Any, *arguments: Any, wrapped: Callable = original, **options: Any) -> Any:
                raise system(errno.EIO, path)

            patch.setattr(os, call, fails)
            with pytest.raises(StoppedError, match="Input/output error") as caught:
                work.remove()
        assert caught.value.place.startswith(str(work.path)) and work.check()
    work.remove()
    assert not list(tmp_path.iterdir())


def test_codes_that_are_damaged_or_cannot_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solved = SolvedCodes(tmp_path / "codes")
    solved.write("module", "key", torch.ones(4, 4, dtype=torch.int8))
    assert solved("module").sum() == 16
    (file,) = (tmp_path / "codes").iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    with pytest.raises(StoppedError, match="its codes are damaged"):
        solved("module")

    def write_bytes(path: Path, data: bytes) -> int:
        raise system(errno.ENOSPC)

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    with pytest.raises(StoppedError, match="cannot be written: No space left"):
        solved.write("module", "key", torch.ones(4, 4, dtype=torch.int8))


def test_a_calibration_folder_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = CalibrationFolder(WorkFolder(tmp_path / "out", Kind.CALIBRATING), False, {}, ExitStack())

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        raise system(errno.EDQUOT, path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(StoppedError, match="cannot be created: Disk quota exceeded"):
        folder.begin({})


# sources that may not be read: the tests run as root


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
def test_a_source_that_cannot_be_read(
    name: str, code: int, case: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(case[0].source, tmp_path / "model"))
    (model / "tokenizer_config.json").write_text("{}")
    before, opened, raw = files_of(model), io.open, os.open

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            if not isinstance(file, int) and Path(os.fsdecode(file)) == model / name:
                raise system(code, model / name)
            return original(file, *arguments, **options)

        return call

    monkeypatch.setattr(io, "open", refuse(opened))
    monkeypatch.setattr("builtins.open", refuse(opened))
    monkeypatch.setattr(os, "open", refuse(raw))
    with pytest.raises(FxquantError, match=os.strerror(code)) as caught:
        compile(model, CompileOptions(policy=POLICY, out=tmp_path / "out", verify=False, export=False))
    assert name in caught.value.place and caught.value.remedy
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert files_of(model) == before


@pytest.mark.parametrize("code", REMEDIES)
def test_every_reason_has_a_way_out(code: int) -> None:
    error = stopped(system(code, "/some/file"))
    assert error.place == "/some/file" and os.strerror(code) in error.fact and error.remedy == REMEDIES[code]
