"""Final rename of finished work, step by step, so that a stop at any point loses nothing.

    UNFINISHED  files/ is being made, verified, and synced to disk
       │  an earlier <out> → replaced/
    ASIDE       files/ is complete; <out> does not exist
       │  files/ → <out>
    NAMED       <out> is complete; replaced/ and the journal are left
       │  replaced/, the journal, the work folder are removed
    NONE

All of it is in `<out>.partial`, on the disk of `<out>`, under one lock. Every arrow but the last is one rename.
"""

from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fxquant.errors import FxquantError, StoppedError
from fxquant.lowering.own_files import refuse_others, remove_output
from fxquant.storage.system_errors import stopping
from fxquant.storage.work_folder import Kind, WorkFolder, remove_tree, sync_folder


class State(StrEnum):
    """Progress of the work on an output, recognised by the files that exist."""

    NONE = "none"
    UNFINISHED = "unfinished"
    ASIDE = "aside"
    NAMED = "named"


@dataclass(frozen=True)
class Places:
    """All paths of the work on `out`, which must not be a link."""

    out: Path

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.out, Kind.PARTIAL)

    @property
    def files(self) -> Path:
        """The folder that is renamed to `out`."""
        return self.work.path / "files"

    @property
    def journal(self) -> Path:
        """The list of finished weights in `files`."""
        return self.work.path / "journal.jsonl"

    @property
    def replaced(self) -> Path:
        """The earlier output during the final rename."""
        return self.work.path / "replaced"

    @property
    def state(self) -> State:
        """The state that the work folder, if it is ours, shows."""
        if not self.journal.is_file():
            return State.NONE
        if self.files.is_dir():
            return State.ASIDE if self.replaced.is_dir() and not filled(self.out) else State.UNFINISHED
        return State.NAMED if filled(self.out) else State.NONE  # only the rename to `out` takes files/ away


def filled(folder: Path) -> bool:
    """Whether the folder exists and is not empty."""
    with stopping(folder, "cannot be examined"):
        return folder.is_dir() and any(folder.iterdir())


def give_name(places: Places, force: bool) -> None:
    """Rename `files`, already synced, to `out`. Raises StoppedError, with everything as it was, if that fails."""
    if filled(places.out):
        if not force:
            raise StoppedError(places.out, "appeared while the command ran.", "Move it elsewhere, or pass --force.")
        if places.replaced.exists():
            fact = "holds an earlier output, and so does " + str(places.out)
            raise StoppedError(places.replaced, f"{fact}.", "Move one of them elsewhere.")
        try:
            refuse_others(places.out)
        except FxquantError as error:  # others' files appeared meanwhile: a StoppedError keeps the work
            raise StoppedError(error.place, error.fact, error.remedy) from None
        with stopping(places.out, "cannot be moved aside"):
            places.out.rename(places.replaced)
    try:
        with stopping(places.out, "cannot be renamed from the work folder"):
            places.files.rename(places.out)
    except BaseException:
        if places.files.exists():
            with suppress(OSError):
                put_back(places)
        raise
    with stopping(places.out, "cannot be synced to disk"):  # both folders of the rename, else a crash may undo it
        sync_folder(places.work.path)
        sync_folder(places.out.parent)


def put_back(places: Places) -> None:
    """Rename the earlier output back to `out`, if it is aside and `out` is absent or empty."""
    if places.replaced.is_dir() and not filled(places.out):
        places.replaced.rename(places.out)


def sweep(places: Places) -> None:
    """Remove what is left after the final rename; the journal, by which the state is recognised, last."""
    if places.replaced.is_dir():
        remove_output(places.replaced)
    with stopping(places.work.path, "cannot be removed"):
        places.journal.unlink(missing_ok=True)
    places.work.remove()


def discard(places: Places) -> None:
    """Remove unfinished work; an earlier output that is aside is renamed back. The work folder itself stays."""
    with stopping(places.replaced, "cannot be moved back"):
        put_back(places)
    if places.replaced.is_dir():
        remove_output(places.replaced)
    for path in (places.journal, places.files):  # journal first: without it, no half-removed file is ever resumed
        if path.exists():
            remove_tree(path)
    places.work.clear()


def sentence(places: Places) -> str:
    """The current state of the output, for the user."""
    out, partial = places.out, places.work.path
    match places.state:
        case State.NAMED:
            return f"The output is complete: {out}. The next command removes {partial}."
        case State.ASIDE:
            return f"{out} does not exist now; the earlier output is {places.replaced}. The same command completes it."
        case State.UNFINISHED:
            unfinished = f"Finished work is kept in {partial}: the same command resumes it."
        case State.NONE:
            calibrating = WorkFolder(out, Kind.CALIBRATING).path
            unfinished = f"Finished work is kept in {calibrating}: the same command resumes it."
            unfinished = unfinished if calibrating.is_dir() else "The same command starts again."
    return (f"{out} is as it was. " if filled(out) else f"Nothing was left at {out}. ") + unfinished
