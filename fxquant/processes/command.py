"""Commands in processes of their own: bounded in time and kept output, ended together with all that they started."""

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
    """How a command ended.

    status  exit status; the signal that ended it, negative
    output  the last `OUTPUT_BYTES` of what it and those that it started printed, standard error included
    """

    status: int
    output: bytes

    @property
    def last_line(self) -> str:
        """Of the output, the last that is not empty; "" where there is none."""
        lines = self.output.decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run_to_end(
    command: Sequence[str], seconds: float, handles: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Ended:
    """Run `command` for at most `seconds`, with no input and no file descriptor but `handles`. Raises TimeoutError.

    When it ends, times out, or this process ends in whatever way, everything that it started ends, in other sessions
    too. Its output is read all the time, and never waited for. Its memory is not bounded.
    """
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", str(SUPERVISOR), str(os.getpid()), ",".join(map(str, handles)), *command],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=handles, env=environment,
        start_new_session=True,
    )  # fmt: skip
    tail = bytearray()
    reader = threading.Thread(target=_read, args=(process.stdout, tail), daemon=True)
    try:
        reader.start()
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        raise TimeoutError(f"not ended within {seconds:g} seconds") from None
    finally:
        _end(process)
    reader.join(1.0)  # what could not be killed might hold the output open
    return Ended(process.returncode, bytes(tail))


def _read(stream: IO[bytes], tail: bytearray) -> None:
    with stream:
        while chunk := os.read(stream.fileno(), OUTPUT_BYTES):
            tail += chunk
            del tail[:-OUTPUT_BYTES]


def _end(process: "subprocess.Popen[bytes]") -> None:
    """The end of its input tells the supervisor to end the command."""
    if process.stdin:
        with suppress(OSError):
            process.stdin.close()
    try:
        process.wait(PATIENCE + 5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_with(parent: int) -> None:
    """Have this process killed when `parent`, which started it, is gone; at once where it is gone already."""
    ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
