"""Child commands under a supervisor: bounded in time and output, killed together with all their descendants."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
        return last_line(self.output)


def last_line(output: bytes | bytearray) -> str:
    """The last line that is not empty, or ""."""
    lines = output.decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_to_end(
    command: Sequence[str], seconds: float, handles: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` for at most `seconds`, without input, inheriting only `handles`. Raises TimeoutError.

    When it exits or times out, or when this process dies for any reason, all its descendants are killed, even those in
    other sessions. Output is drained continuously and never waited for. Memory is not bounded.
    """
    tail = bytearray()
    with supervised(command, handles, environment) as process:
        thread = drained(process.stdout, tail)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"still running after {seconds:g} seconds") from None
    thread.join(1.0)  # a process that could not be killed may hold the pipe open
    return Ended(process.returncode, bytes(tail))


@contextmanager
def supervised(
    command: Sequence[str], handles: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> "Iterator[subprocess.Popen[bytes]]":
    """The supervisor of `command` while the block is open: its stdout and its status are the command's.

    It is in a session of its own: Ctrl-C in the terminal reaches this process alone, which then ends the command.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR), str(os.getpid()), ",".join(map(str, handles)), *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=handles, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        _end(process)


def drained(stream: IO[bytes] | None, tail: bytearray) -> threading.Thread:
    """A thread, started, that reads `stream` to its end and keeps its last `OUTPUT_BYTES` in `tail`."""
    thread = threading.Thread(target=_read, args=(stream, tail), daemon=True)
    thread.start()
    return thread


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
