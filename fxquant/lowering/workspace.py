"""Workspace `<out>.partial`: where an output folder is made, its lock, and how it resumes after a kill.

<out>.partial/fxquant_work.json   marks the folder as ours
<out>.partial/files/              becomes <out>, by one rename
<out>.partial/journal.jsonl       lists its finished weights
<out>.partial/replaced/           an earlier output during the final rename, see finish.py
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxquant.calibration.calibration_file import CALIBRATION
from fxquant.checkpoint.stamped_bytes import Stamps
from fxquant.errors import FxquantError, StoppedError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import INDEX_BYTES
from fxquant.lowering.destination import Destination
from fxquant.lowering.finish import Places, State, discard, give_name, sweep
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS, read_manifest
from fxquant.lowering.weights.digests import file_digest
from fxquant.lowering.weights.journal import Fingerprint, Journal, begin, go_on, read_fingerprint
from fxquant.lowering.weights.reserve import sync
from fxquant.storage.system_errors import stopping, told

RESTART = "Pass --restart to discard it, or choose another -o."
REASONS = {
    "format": "work with another journal format ({theirs}, this is {ours})",
    "fxquant": "work of fxquant {theirs}, this is {ours}",
    "kernels": "work of other kernels (version {theirs}, these are {ours})",
    "policy": "work under policy {theirs}, this is {ours}",
    "target": "work for target {theirs}, this is {ours}",
    "sources": "work on another source: {difference}",
    "layout": "work with other weight files: another model, policy, --mtp or --max-shard-size",
    "units": "work with other integers: the policy's rules or the calibration have changed",
}
"""Field of the fingerprint → why unfinished work is not the same work; the first that differs is reported."""


def known_folders(destination: Destination) -> list[Path]:
    """Folders in which an earlier run of the same command may have left its calibration."""
    places = destination.places
    return [places.out] if places.state is State.NAMED else [places.files]


def made_of(folder: Path, stamps: Stamps) -> bool:
    """Whether an output, or the files of unfinished work, was made from checkpoint files in exactly these states, and
    its calibration file is as it was written."""
    expected = {file.name: [stamp.header, stamp.size, stamp.mtime_ns] for file, stamp in stamps.items()}
    journal = folder.with_name("journal.jsonl")
    try:
        if (folder / MANIFEST).is_file():
            document, written = read_json(folder / STAMPS, INDEX_BYTES), read_manifest(folder).digests.get(CALIBRATION)
            written_stamps: Any = {name: list(stamp.values()) for name, stamp in document.items()}
        else:
            fingerprint = read_fingerprint(journal) or {}
            written_stamps, written = fingerprint.get("sources"), fingerprint.get("calibration")
        return written_stamps == expected and written == file_digest(folder / CALIBRATION)
    except (OSError, AttributeError, FxquantError):
        return False


@dataclass
class Workspace:
    """The work folder during the work; `folder` becomes `out`.

    owned      this process has made, or resumes, its contents
    resumable  it has a journal
    """

    destination: Destination
    owned: bool = False
    resumable: bool = False

    @property
    def places(self) -> Places:
        return self.destination.places

    @property
    def folder(self) -> Path:
        return self.places.files

    @property
    def named(self) -> bool:
        """Whether an earlier run has done the final rename, but was stopped before it had removed everything else."""
        return self.places.state is State.NAMED

    def unfinished(self, fingerprint: Fingerprint) -> Journal | None:
        """The journal of the same work, to resume; None, after clearing the folder, if there is no journal.

        Raises FxquantError, with the reason, for a journal of other work.
        """
        earlier = read_fingerprint(self.places.journal)
        if earlier is None or self.places.state is State.NONE:
            self.clear()
            return None
        reason = _difference(earlier, fingerprint)
        if reason is not None:
            raise FxquantError(self.places.work.path, f"holds unfinished {reason}.", RESTART)
        journal = go_on(self.places.journal)
        self.owned = self.resumable = True
        return journal

    def begin(self, fingerprint: Fingerprint) -> Journal:
        """A journal for new work; from now on finished units survive an end of the process."""
        journal = begin(self.places.journal, fingerprint)
        self.resumable = True
        return journal

    def clear(self) -> None:
        """Remove earlier work; an earlier output that it had moved aside is renamed back."""
        discard(self.places)
        with stopping(self.folder, "cannot be created"):
            self.folder.mkdir()
        self.owned = True

    def finish(self, journal: Journal, identity: str, named: Callable[[], None]) -> None:
        """Sync everything to disk and do the final rename; an earlier output is removed after that.

        `identity`: hash of the documents' inputs; `named` is called after the rename.
        """
        journal.complete(identity)
        sync(self.folder)
        give_name(self.places, self.destination.force)
        self.end(named)

    def end(self, named: Callable[[], None]) -> None:
        """Remove what is left after the final rename."""
        self.owned, self.destination.finished = False, True  # first: an error below must not discard the output
        named()
        sweep(self.places)

    def completed(self, fingerprint: Fingerprint, identity: str) -> bool:
        """Whether the output that was already renamed is the one that this command would make."""
        earlier = read_fingerprint(self.places.journal)
        if earlier is None or _difference(earlier, fingerprint) is not None:
            return False
        journal = go_on(self.places.journal)
        journal.stream.close()
        return journal.identity == identity


@contextmanager
def open_workspace(destination: Destination, restart: bool) -> Iterator[Workspace]:
    """`<out>.partial`, locked by this process.

    Work that was stopped from outside stays there with its journal, for the same command to resume. A fault of the
    input, or of the output when it is verified, leaves nothing: the same command would meet it again.
    """
    work, partial = Workspace(destination), destination.places.work.path
    with destination.places.work.held():
        try:
            if destination.force if work.named else restart:
                work.clear()
            yield work
            destination.places.work.release()
        except BaseException as raised:
            error = told(raised, partial)
            fault = isinstance(error, FxquantError) and not isinstance(error, StoppedError)
            _leave(work, fault)
            if work.owned and work.resumable and isinstance(error, StoppedError):
                resumable = f"Finished work is kept in {partial}: the same command resumes it."
                raise StoppedError(error.place, error.fact, f"{error.remedy} {resumable}") from None
            if error is raised:
                raise
            raise error from None


def _leave(work: Workspace, fault: bool) -> None:
    """Remove work that cannot be resumed. What cannot be removed now is cleared by the next command."""
    with suppress(FxquantError):  # the first error is the one to report
        if work.owned and (fault or not work.resumable):
            discard(work.places)
        if work.places.state is State.NONE:
            work.places.work.release()


def _difference(theirs: Fingerprint, ours: Fingerprint) -> str | None:
    """Why unfinished work is not the same work, or None."""
    for field, reason in REASONS.items():
        if theirs.get(field) != ours[field]:
            other = _other_file(theirs.get(field), ours[field]) if field == "sources" else ""
            return reason.format(theirs=theirs.get(field), ours=ours[field], difference=other)
    return None


def _other_file(theirs: Any, ours: dict[str, Any]) -> str:
    """The first file that differs."""
    theirs = theirs if isinstance(theirs, dict) else {}
    for name in sorted(set(theirs) | set(ours)):
        if theirs.get(name) != ours.get(name):
            missing = "is new" if name not in theirs else "is gone" if name not in ours else "has changed"
            return f"{name} {missing}"
    return "other files"
