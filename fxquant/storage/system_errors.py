"""Errors of the operating system, a full disk or a file that may not be read, as errors for people."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fxquant.errors import StoppedError

SPACE, RIGHTS = "Free space, or choose a folder on another disk.", "Check who may read and write it."
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: "Free space, or have the quota raised.",
    errno.EFBIG: "Choose a file system that takes such files, or a smaller --max-shard-size.",
    errno.EROFS: "Choose a folder on a disk that can be written.",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EIO: "Check the disk.",
    errno.EMFILE: "Raise the limit of open files: ulimit -n.",
    errno.ENFILE: "The machine has too many files open: end other processes.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Check the links on the way there.",
    errno.ESTALE: "Mount the file system again.",
    errno.EBUSY: "End what uses it.",
}


def stopped(error: OSError, place: object = "", what: str = "") -> StoppedError:
    """`place` (else the file that the system names), `what` could not be done with it, the system's reason."""
    reason = error.strerror or ": ".join(filter(None, (type(error).__name__, str(error))))
    remedy = REMEDIES.get(error.errno or 0, "Mend that, then run the same command again.")
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
