"""`<out>.partial`: where an output folder comes into being, who works in it, and how it goes on after a kill.

<out>.partial/files/          what becomes <out>, by one rename
<out>.partial/journal.jsonl   which of its weights are finished
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError, StoppedError
from fxquant.locking import locked
from fxquant.lowering.manifest import STAMPS
from fxquant.lowering.weights.journal import Fingerprint, Journal, begin, go_on, read_fingerprint
from fxquant.lowering.weights.reserve import sync
from fxquant.source_reader import Stamps

FILES, JOURNAL = "files", "journal.jsonl"
REASONS = {
    "format": "a journal of another format ({theirs}, this is {ours})",
    "fxquant": "work of fxquant {theirs}, this is {ours}",
    "kernels": "work of other kernels (version {theirs}, these are {ours})",
    "policy": "work under policy {theirs}, this is {ours}",
    "target": "work for target {theirs}, this is {ours}",
    "sources": "work on another source: {difference}",
    "layout": "work with other weight files: another model, policy, --mtp or --max-shard-size",
    "units": "work with other integers: the policy's rules or the calibration are not what they were",
}
"""Field of the fingerprint → why unfinished work is not this work, in the order of asking."""


def unfinished_folder(out: Path) -> Path:
    """Where unfinished work on `out` has its files, if there is any."""
    return out.with_name(out.name + ".partial") / FILES


def made_of(folder: Path, stamps: Stamps) -> bool:
    """Whether an output, or the files of unfinished work, was made from checkpoint files in just these states."""
    wanted = {file.name: [stamp.header, stamp.size, stamp.mtime_ns] for file, stamp in stamps.items()}
    try:
        found = json.loads((folder / STAMPS).read_text(encoding="utf-8"))
        return {name: list(stamp.values()) for name, stamp in found.items()} == wanted
    except FileNotFoundError:
        unfinished = read_fingerprint(folder.parent / JOURNAL)
        return unfinished is not None and unfinished.get("sources") == wanted
    except (OSError, ValueError, AttributeError):
        return False


@dataclass
class Workspace:
    """The folder while work goes on; `folder` is what becomes `out`.

    owned      this process made what is in it, or goes on with it
    resumable  it has a journal
    """

    out: Path
    partial: Path
    owned: bool = False
    resumable: bool = False

    @property
    def folder(self) -> Path:
        return self.partial / FILES

    def unfinished(self, fingerprint: Fingerprint) -> Journal | None:
        """The journal of the same work, to go on with, or None after clearing what has none.

        Raises FxquantError, with the reason, for a journal of other work.
        """
        found = read_fingerprint(self.partial / JOURNAL)
        if found is None:
            self.clear()
            return None
        reason = _difference(found, fingerprint)
        if reason is not None:
            way_out = "Pass --restart to discard it, or choose another -o."
            raise FxquantError(self.partial, f"holds unfinished {reason}.", way_out)
        journal = go_on(self.partial / JOURNAL)
        self.owned = self.resumable = True
        return journal

    def begin(self, fingerprint: Fingerprint) -> Journal:
        """A journal for new work; from now on what is finished survives an end of the process."""
        self.resumable = True
        return begin(self.partial / JOURNAL, fingerprint)

    def clear(self) -> None:
        """Forget earlier work."""
        for path in self.partial.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        self.folder.mkdir()
        self.owned = True

    def finish(self) -> None:
        """Have all of it on the disk, and give the folder its name; an earlier output goes when that is done."""
        sync(self.folder)
        old = self.out.with_name(self.out.name + ".replaced")
        if self.out.exists():
            if old.exists():
                shutil.rmtree(old)
            self.out.rename(old)
        self.folder.rename(self.out)
        self.owned = False
        sync(self.out.parent, files=False)
        shutil.rmtree(self.partial)
        if old.exists():
            shutil.rmtree(old)


@contextmanager
def open_workspace(out: Path, restart: bool) -> Iterator[Workspace]:
    """`<out>.partial`, for this process alone.

    What the world stopped stays there with its journal, for the same command to go on with. A fault of the input, or
    of the output when it is verified, leaves nothing: the same command would find it again.
    """
    work = Workspace(out, out.with_name(out.name + ".partial"))
    work.partial.mkdir(parents=True, exist_ok=True)
    with locked(work.partial):
        try:
            if restart:
                work.clear()
            yield work
        except BaseException as raised:
            error = _stopped(raised, work.partial)
            fault = isinstance(error, FxquantError) and not isinstance(error, StoppedError)
            if work.owned and (fault or not work.resumable):
                shutil.rmtree(work.partial, ignore_errors=True)
            elif work.owned and isinstance(error, StoppedError):
                kept = f"What is finished is kept in {work.partial}: the same command goes on with it."
                raise StoppedError(error.place, error.fact, f"{error.remedy} {kept}") from None
            raise error from None


def _stopped(error: BaseException, partial: Path) -> BaseException:
    """An error of the operating system, of a full disk for example, as one for people."""
    if not isinstance(error, OSError):
        return error
    return StoppedError(error.filename or partial, f"{error.strerror or error}.", "Free space or repair the disk.")


def _difference(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    """Why unfinished work is not this work, or None."""
    for field, reason in REASONS.items():
        if theirs.get(field) != ours[field]:
            other = _other_file(theirs.get(field), ours[field]) if field == "sources" else ""
            return reason.format(theirs=theirs.get(field), ours=ours[field], difference=other)
    return None


def _other_file(theirs: Any, ours: dict[str, Any]) -> str:
    """The first file that is another one."""
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            missing = "is new" if name not in theirs else "is gone" if name not in ours else "has changed"
            return f"{name} {missing}"
    return "other files"
