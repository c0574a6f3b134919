"""One process at a time in a folder of unfinished work."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import FxquantError, StoppedError


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A lock that ends with the process, however it ends. Raises FxquantError where another has it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FxquantError(folder, "another fxquant is at work in it.", "Wait for it, or choose another -o.") from None
    except OSError as error:
        raise StoppedError(folder, f"cannot be locked: {error.strerror}.", "Choose an -o that can.") from None
