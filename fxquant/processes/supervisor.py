"""Runs a command, and when it is over ends every process that came from it, whatever session they are in.

python -I -S supervisor.py PARENT HANDLES COMMAND …

PARENT is the process that started this one, HANDLES the file descriptors that the command inherits, with commas. The
exit status is the command's. Nothing is ever written to standard input: when PARENT closes it, or is gone, the command
is ended. Linux only; imports nothing of fxquant.
"""

import ctypes
import os
import resource
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SET_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36
"""Options of prctl(2): the signal that the end of the parent sends; whose children orphans become."""
PATIENCE = 10.0
"""Seconds for processes to be gone that were killed."""


def main(parent: int, handles: list[int], command: list[str]) -> None:
    """Run `command` to its end, or PARENT's, and end as it did."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    waking, woken = os.pipe()
    for end in (waking, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=handles)
    status = _wait(started.pid, parent, waking)  # `started` stays: without it, subprocess would ask for the status
    end_descendants()
    _end_as(status)


def _wait(started: int, parent: int, waking: int) -> int | None:
    """How `started` ended, as waitpid says it; None where nobody wants to know any more."""
    while os.getppid() == parent:
        pid = -1
        while pid:  # 0: none has ended since
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == started:
                return status
        ready, _, _ = select.select([0, waking], [], [])
        if 0 in ready:
            return None
        os.read(waking, 1 << 12)
    return None


def end_descendants() -> None:
    """Kill all that came from this process: orphans become its children, so it is over when there are none."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for pid in _descendants():
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
            time.sleep(0.005)
            continue
        return


def _descendants() -> set[int]:
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, ValueError):
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()  # a name may hold all else
            parents[int(folder.name)] = int(fields[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {os.getpid()}


def _end_as(status: int | None) -> None:
    if status is not None and os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it is not this process that should leave a core
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(1 if status is None else os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(handle) for handle in sys.argv[2].split(",") if handle], sys.argv[3:])
