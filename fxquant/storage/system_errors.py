"""OSError to StoppedError: a full disk or an unreadable file, with the place and a remedy for each errno."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from fxquant.errors import StoppedError

SPACE, RIGHTS = "Free space, or choose a folder on another disk.", "Check its owner and permissions."
REMEDIES = {
    errno.ENOSPC: SPACE,
    errno.EDQUOT: "Free space, or ask for a larger quota.",
    errno.EFBIG: "Choose a file system for larger files, or a smaller --max-shard-size.",
    errno.EROFS: "Choose a folder on a writable disk.",
    errno.EACCES: RIGHTS,
    errno.EPERM: RIGHTS,
    errno.EIO: "Check the disk.",
    errno.EMFILE: "Raise the limit on open files: ulimit -n.",
    errno.ENFILE: "The machine has too many open files: stop other processes.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.ELOOP: "Check the symbolic links in its path.",
    errno.ESTALE: "Mount the file system again.",
    errno.EBUSY: "Stop the process that uses it.",
}


def stopped(error: OSError, place: object = "", what: str = "") -> StoppedError:
    """An error at `place` (default: the file that the system names) with `what` failed and the system's reason."""
    reason = error.strerror or ": ".join(filter(None, (type(error).__name__, str(error))))
    remedy = REMEDIES.get(error.errno or 0, "Fix the cause, then run the same command again.")
    return StoppedError(place or error.filename or "a file", f"{what}: {reason}." if what else f"{reason}.", remedy)


def told(error: BaseException, near: object) -> BaseException:
    """An OSError as a StoppedError, placed at `near` if it names no file; any other error unchanged."""
    if not isinstance(error, OSError) or isinstance(error, BrokenPipeError):
        return error
    return stopped(error, error.filename or near)


@contextmanager
def stopping(place: object = "", what: str = "") -> Iterator[None]:
    """Raises `stopped` for an OSError inside; BrokenPipeError passes: the reader of our output just left."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise stopped(error, place, what) from None
