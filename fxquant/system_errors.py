"""Errors of the operating system, a full disk or a file that may not be read, as errors for people."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fxquant.errors import StoppedError

SPACE, RIGHTS, DISK = "Free space, or choose another -o.", "Give your user the right to it.", "Repair the disk."
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: SPACE,
    errno.EFBIG: "Choose an -o on a file system that takes such files, or a smaller --max-shard-size.",
    errno.EROFS: "Choose an -o on a disk that can be written.",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EIO: DISK,
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ESTALE: "Mount the file system again.",
    errno.EBUSY: "End what uses it.",
}


def stopped(error: OSError, place: object = "", what: str = "") -> StoppedError:
    """`place` (else the file that the system names), `what` could not be done with it, the system's reason."""
    reason = error.strerror or str(error) or type(error).__name__
    remedy = REMEDIES.get(error.errno or 0, "Free space or repair the disk.")
    return StoppedError(place or error.filename or "a file", f"{what}: {reason}." if what else f"{reason}.", remedy)


def told(error: BaseException, near: object) -> BaseException:
    """An error of the operating system as one for people, `near` where it names no file; any other as it is."""
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return error
    return stopped(error, error.filename or near)


@contextmanager
def stopping(place: object = "", what: str = "") -> Iterator[None]:
    """Raises `stopped` for an OSError from within; a reader of our output that went away is none of them."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise stopped(error, place, what) from None
