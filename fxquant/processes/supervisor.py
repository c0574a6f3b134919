"""Supervisor process: runs a command, then kills every descendant of it, in any session.

python -I -S supervisor.py PARENT HANDLES COMMAND …

PARENT is the id of the process that started this one, HANDLES a comma-separated list of file descriptors that the
command inherits. The exit status is the command's. Standard input carries no data: when PARENT closes it or dies, the
command is killed. Linux only; imports nothing from fxquant.
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
"""prctl(2) options: the signal sent when the parent dies; become the parent of orphaned descendants."""
PATIENCE = 10.0
"""Seconds to wait for killed processes to disappear."""


def main(parent: int, handles: list[int], command: list[str]) -> None:
    """Run `command` until it exits or PARENT dies, then exit with the same status or signal."""
    prctl = ctypes.CDLL(None).prctl
    prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    prctl(SET_DEATH_SIGNAL, signal.SIGTERM, 0, 0, 0)
    waking, woken = os.pipe()
    for end in (waking, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken)
    # only a signal with a handler is written to the wakeup pipe; the default action of SIGCHLD is to ignore it
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    started = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=handles)
    status = _wait(started.pid, parent, waking)  # keep `started` alive: its finalizer would reap the child
    end_descendants()
    _end_as(status)


def _wait(started: int, parent: int, waking: int) -> int | None:
    """The waitpid status of `started`; None if PARENT closed stdin or died."""
    while os.getppid() == parent:
        pid = -1
        while pid:  # until no further child has exited: one SIGCHLD may stand for several
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == started:
                return status
        ready, _, _ = select.select([0, waking], [], [])
        if 0 in ready:
            return None
        os.read(waking, 1 << 12)
    return None


def end_descendants() -> None:
    """Kill all descendants. Orphans become children of this process, so it is done once it has no children."""
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
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()  # a name may hold spaces and )
            parents[int(folder.name)] = int(fields[1])
    processes = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in processes} - processes:
        processes |= more
    return processes - {os.getpid()}


def _end_as(status: int | None) -> None:
    if status is not None and os.WIFSIGNALED(status):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the command may dump core, not this process as well
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    sys.exit(1 if status is None else os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(handle) for handle in sys.argv[2].split(",") if handle], sys.argv[3:])
