"""Child commands under a supervisor: bounded in time and output, killed together with all their descendants."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fxquant.inputs.limits import OUTPUT_BYTES
from fxquant.processes.supervisor import PATIENCE, SET_DEATH_SIGNAL

SUPERVISOR = Path(__file__).with_name("supervisor.py")


@dataclass(frozen=True)
class Ended:
    """The result of a command.

    status  exit status, or the negative number of the signal that killed it
    output  the last `OUTPUT_BYTES` of stdout and stderr, of the command and its descendants
    """

    status: int
    output: bytes

    @property
    def last_line(self) -> str:
        """The last non-empty line of the output, or ""."""
        lines = self.output.decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_to_end(
    command: Sequence[str], seconds: float, handles: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` for at most `seconds`, without input, inheriting only `handles`. Raises TimeoutError.

    When it exits or times out, or when this process dies for any reason, all its descendants are killed, even those in
    other sessions. Output is drained continuously and never waited for. Memory is not bounded.
    """
    # a session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the command
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR), str(os.getpid()), ",".join(map(str, handles)), *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=handles, env=environment,
        start_new_session=True,
    )  # fmt: skip
    tail = bytearray()
    thread = threading.Thread(target=_read, args=(process.stdout, tail), daemon=True)
    try:
        thread.start()
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"still running after {seconds:g} seconds") from None
    finally:
        _end(process)
    thread.join(1.0)  # a process that could not be killed may hold the pipe open
    return Ended(process.returncode, bytes(tail))


def _read(stream: IO[bytes], tail: bytearray) -> None:
    with stream:
        while chunk := os.read(stream.fileno(), OUTPUT_BYTES):
            tail += chunk
            del tail[:-OUTPUT_BYTES]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Closing its stdin tells the supervisor to kill the command."""
    if process.stdin:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(PATIENCE + 5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with(parent: int) -> None:
    """Have the kernel kill this process when its parent `parent` dies; kill it now if the parent is already dead."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before prctl, which reports later deaths only
        os.kill(os.getpid(), signal.SIGKILL)
