"""Work folder: unfinished work beside an output, owned through a marker file and locked by one process at a time.

The marker is written and synced to disk before anything else. A folder without a marker belongs to somebody else:
nothing in it is read, written or deleted. An empty folder may be used, as may one with nothing but a truncated marker,
which is what a kill while writing it leaves behind.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from fxquant.errors import FxquantError
from fxquant.storage.lock import locked
from fxquant.storage.system_errors import stopped, stopping
from fxquant.storage.whole_calls import read_at, write_at

MARKER = "fxquant_work.json"
FORMAT = 1
ABOUT = "Unfinished work of fxquant, which deletes this folder and all that is in it."
MOVE = "Move it elsewhere, or choose another -o."
NOT_OURS = b"?"
NAMED = 4
"""File names quoted in an error."""


class Kind(StrEnum):
    """Purpose of a work folder, and the suffix of its name."""

    PARTIAL = "partial"
    CALIBRATING = "calibrating"


CONTENTS = {
    Kind.PARTIAL: {"files", "journal.jsonl", "journal.jsonl.new", "replaced"},
    Kind.CALIBRATING: {"state.safetensors", "state.safetensors.new", "codes"},
}
"""Everything that such a folder may hold besides the marker."""


@dataclass(frozen=True)
class WorkFolder:
    """`<out>.<kind>`, which need not exist. `out` must not be a link."""

    out: Path
    kind: Kind

    @property
    def path(self) -> Path:
        return self.out.with_name(f"{self.out.name}.{self.kind}")

    @property
    def marker(self) -> bytes:
        """Content of the marker file. It names the output, so a renamed folder no longer belongs to it."""
        document = {"about": ABOUT, "format": FORMAT, "kind": self.kind.value, "out": self.out.name}
        return (json.dumps(document, indent=2) + "\n").encode("ascii")

    def check(self, deep: bool = False) -> bool:
        """Whether it exists. Raises FxquantError if it is not ours, or holds files that we did not write.

        `deep`: also look for links at any depth; needs the lock, so that no other process changes it meanwhile.
        """
        path = self.path
        with stopping(path, "cannot be examined"):
            try:
                folder = is_folder(path)
            except FileNotFoundError:
                return False
            if not folder:
                raise FxquantError(path, "is a file or a link where a work folder is expected.", MOVE)
            if os.path.ismount(path):
                raise FxquantError(path, "is a mount point, not a work folder of fxquant.", MOVE)
            names = names_in(path)
            if self._fresh(names):
                return True
            if not self._marked():
                raise FxquantError(path, f"was not made by fxquant for this output: {listed(names)}.", MOVE)
            self._refuse_others(names - CONTENTS[self.kind] - {MARKER}, deep)
        return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create it, lock it, and mark it as ours. Raises FxquantError as `check` does."""
        with stopping(self.path, "cannot be created"), suppress(FileExistsError):
            self.path.mkdir(parents=True)
        self.check()  # before the lock: a foreign folder is left alone
        with locked(self.path):
            self.check(deep=True)  # again: it may have changed before the lock was ours
            self._mark()
            yield

    def clear(self) -> None:
        """Remove everything in it except the marker. Raises StoppedError."""
        with stopping(self.path, "cannot be cleared"):
            names = sorted(names_in(self.path) - {MARKER})
        for name in names:
            remove_tree(self.path / name)

    def remove(self) -> None:
        """Remove it, the marker last, so that after a kill it is still ours. Raises StoppedError."""
        self.clear()
        with stopping(self.path, "cannot be removed"):
            (self.path / MARKER).unlink(missing_ok=True)
            self.path.rmdir()

    def release(self) -> None:
        """Remove it if it holds nothing but the marker."""
        if self.path.is_dir() and self._marked() and names_in(self.path) == {MARKER}:
            self.remove()

    def _fresh(self, names: set[str]) -> bool:
        """Whether it is empty, or holds nothing but a (possibly truncated) marker of ours."""
        return not names or (names == {MARKER} and self.marker.startswith(self._marker_found() or b""))

    def _marked(self) -> bool:
        return self._marker_found() == self.marker

    def _marker_found(self) -> bytes | None:
        try:
            # O_NONBLOCK: a FIFO of this name would block the open
            handle = os.open(self.path / MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):  # a link, a socket
                return NOT_OURS
            raise stopped(error, self.path / MARKER, "cannot be read") from None
        try:
            with stopping(self.path / MARKER, "cannot be read"):
                regular = stat.S_ISREG(os.fstat(handle).st_mode)
                return read_at(handle, len(self.marker) + 1, 0) if regular else NOT_OURS
        finally:
            os.close(handle)

    def _mark(self) -> None:
        if self._marked():
            return
        try:
            handle = os.open(self.path / MARKER, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o644)
            try:
                write_at(handle, self.marker, 0)
                os.fsync(handle)
            finally:
                os.close(handle)
            sync_folder(self.path)  # fsync of a file does not cover its directory entry
        except OSError as error:
            with suppress(OSError):
                (self.path / MARKER).unlink(missing_ok=True)
                self.path.rmdir()
            raise stopped(error, self.path / MARKER, "cannot be written") from None

    def _refuse_others(self, names: set[str], deep: bool) -> None:
        inner = walk(self.path) if deep else ()
        links = (path for path in inner if path.is_symlink() or not (path.is_file() or path.is_dir()))
        names |= {path.relative_to(self.path).as_posix() for path in links}
        if names:
            raise FxquantError(self.path, f"holds files that fxquant did not write: {listed(names)}.", MOVE)


def is_folder(path: Path) -> bool:
    """Whether it is a folder, not a link to one."""
    return stat.S_ISDIR(os.lstat(path).st_mode)


def names_in(folder: Path) -> set[str]:
    """Names of its entries. Raises OSError."""
    return {path.name for path in folder.iterdir()}


def walk(folder: Path) -> Iterator[Path]:
    """Everything under `folder`, without following links. Raises OSError if a folder cannot be listed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield folder / entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from walk(folder / entry.name)


def listed(names: set[str]) -> str:
    """The first few names, and the number of the others."""
    first = ", ".join(sorted(names)[:NAMED])
    return first + (f" and {len(names) - NAMED:,} more" if len(names) > NAMED else "")


def remove_tree(path: Path) -> None:
    """Remove a file, a link (not its target), or a folder with its content. Raises StoppedError."""
    try:
        if is_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        inner = f" ({error.filename})" if error.filename not in (None, str(path), path) else ""
        raise stopped(error, path, f"cannot be removed{inner}") from None


def sync_folder(path: Path) -> None:
    """Flush the directory entries of `path` to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
