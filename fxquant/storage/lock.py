"""File lock: one process at a time in a folder of unfinished work."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import FxquantError, StoppedError
from fxquant.storage.system_errors import stopping

BUSY = "another fxquant process is using it."


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold an flock on `folder`; the kernel releases it when the process dies. Raises FxquantError if it is taken."""
    with stopping(folder, "cannot be opened"):  # the folder itself is locked, so no lock file can be left behind
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
        raise FxquantError(folder, BUSY, "Wait for it to finish, or choose another -o.") from None
    except OSError as error:
        raise StoppedError(folder, f"cannot be locked: {error.strerror}.", "Choose an -o that can be.") from None
    if not _is_still(handle, folder):
        raise FxquantError(folder, BUSY, "It has just finished: run the command again.")


def _is_still(handle: int, folder: Path) -> bool:
    """Whether `folder` is still the opened one: the previous owner may have removed it before releasing the lock."""
    try:
        with stopping(folder, "cannot be examined"):
            return os.path.samestat(os.fstat(handle), os.lstat(folder))
    except StoppedError:
        if folder.exists():
            raise
        return False
