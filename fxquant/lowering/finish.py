"""How finished work gets its final name, step by step, so that a stop at any point loses nothing.

    UNFINISHED  files/ is being made, verified, and brought to the disk
       │  an earlier <out> → replaced/
    ASIDE       files/ is complete; nothing has the name
       │  files/ → <out>
    NAMED       <out> is complete; replaced/ and the journal are left
       │  replaced/, the journal, the work folder are removed
    NONE

All of it lies in `<out>.partial`, on the disk of `<out>`, under one lock. Every arrow but the last is one rename.
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
    """How far the work on an output is, told by what lies there."""

    NONE = "none"
    UNFINISHED = "unfinished"
    ASIDE = "aside"
    NAMED = "named"


@dataclass(frozen=True)
class Places:
    """Where everything of the work on `out`, which is no link, lies."""

    out: Path

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.out, Kind.PARTIAL)

    @property
    def files(self) -> Path:
        """What becomes `out`."""
        return self.work.path / "files"

    @property
    def journal(self) -> Path:
        """Which of the weights in `files` are finished."""
        return self.work.path / "journal.jsonl"

    @property
    def replaced(self) -> Path:
        """The earlier output while the new one gets its name."""
        return self.work.path / "replaced"

    @property
    def state(self) -> State:
        """What the work folder, if it is ours, tells."""
        if not self.journal.is_file():
            return State.NONE
        if self.files.is_dir():
            return State.ASIDE if self.replaced.is_dir() and not filled(self.out) else State.UNFINISHED
        return State.NAMED if filled(self.out) else State.NONE


def filled(folder: Path) -> bool:
    """Whether there is anything in it."""
    with stopping(folder, "cannot be looked at"):
        return folder.is_dir() and any(folder.iterdir())


def give_name(places: Places, force: bool) -> None:
    """`files`, synced, becomes `out`. Raises StoppedError, with all that is there where it was, if that can't be."""
    if filled(places.out):
        if not force:
            raise StoppedError(places.out, "has come to be there meanwhile.", "Move it elsewhere, or pass --force.")
        if places.replaced.exists():
            fact = "holds an earlier output, and so does " + str(places.out)
            raise StoppedError(places.replaced, f"{fact}.", "Move one of them elsewhere.")
        try:
            refuse_others(places.out)
        except FxquantError as error:  # it came there meanwhile: no reason to forget the work
            raise StoppedError(error.place, error.fact, error.remedy) from None
        with stopping(places.out, "cannot be put aside"):
            places.out.rename(places.replaced)
    try:
        with stopping(places.out, "cannot get its name"):
            places.files.rename(places.out)
    except BaseException:
        if places.files.exists():
            with suppress(OSError):
                put_back(places)
        raise
    with stopping(places.out, "cannot be written to the disk"):
        sync_folder(places.work.path)
        sync_folder(places.out.parent)


def put_back(places: Places) -> None:
    """Give the name to the earlier output again, if it is aside and nothing else has it."""
    if places.replaced.is_dir() and not filled(places.out):
        places.replaced.rename(places.out)


def sweep(places: Places) -> None:
    """Remove what is left when the new output has its name; the journal, which says so, last."""
    if places.replaced.is_dir():
        remove_output(places.replaced)
    with stopping(places.work.path, "cannot be removed"):
        places.journal.unlink(missing_ok=True)
    places.work.remove()


def discard(places: Places) -> None:
    """Forget unfinished work; an earlier output that is aside gets its name again. The folder itself stays."""
    with stopping(places.replaced, "cannot be put back"):
        put_back(places)
    if places.replaced.is_dir():
        remove_output(places.replaced)
    for path in (places.journal, places.files):  # without its journal no unfinished file is ever gone on with
        if path.exists():
            remove_tree(path)
    places.work.clear()


def sentence(places: Places) -> str:
    """What is true of the output now, for people."""
    out, partial = places.out, places.work.path
    match places.state:
        case State.NAMED:
            return f"The output is complete: {out}. The next command removes {partial}."
        case State.ASIDE:
            return f"Nothing has the name {out} yet; the earlier output is {places.replaced}. The same command ends it."
        case State.UNFINISHED:
            unfinished = f"What is finished is kept in {partial}: the same command goes on with it."
        case State.NONE:
            calibrating = WorkFolder(out, Kind.CALIBRATING).path
            unfinished = f"What is finished is kept in {calibrating}: the same command goes on with it."
            unfinished = unfinished if calibrating.is_dir() else "The same command begins anew."
    return (f"{out} is as it was. " if filled(out) else f"Nothing was left at {out}. ") + unfinished
