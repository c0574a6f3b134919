"""One process at a time in a folder of unfinished work."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.system_errors import stopping

BUSY = "another fxquant is at work in it."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock that ends with the process, however it ends. Raises FxquantError where another has it."""
    with stopping(folder, "cannot be opened"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FxquantError(folder, BUSY, "Wait for it, or choose another -o.") from None
    except OSError as error:
        raise StoppedError(folder, f"cannot be locked: {error.strerror}.", "Choose an -o that can.") from None
    if not _is_still(handle, folder):
        raise FxquantError(folder, BUSY, "It has just ended: run the command again.")


def _is_still(handle: int, folder: Path) -> bool:
    """Whether who had the lock before has not removed the folder meanwhile."""
    try:
        with stopping(folder, "cannot be looked at"):
            return os.path.samestat(os.fstat(handle), os.lstat(folder))
    except StoppedError:
        if folder.exists():
            raise
        return False
