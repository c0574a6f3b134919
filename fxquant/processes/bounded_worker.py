"""Foreign text code, chat templates and tokenizers, in a process of its own with bounded time and memory."""

import json
import os
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from signal import SIGALRM, SIGPROF
from typing import Any

from fxquant.inputs.limits import MIB, WALL

QUIET = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"}
"""A worker has one thread, whose memory is counted, and prints no panic."""


class WorkerError(Exception):
    """What the foreign code did wrong, as a part of a sentence."""


class BoundedWorker:
    """One `text_worker` process, started when first asked, and anew after one that had to be ended.

    what     "template" or "tokenizer", with what it is opened from
    memory   bytes that the process may have, itself included
    """

    def __init__(self, what: str, memory: int, seconds: float, **source: str) -> None:
        self._opening: dict[str, Any] = {"open": what, "memory": memory, "seconds": seconds, **source}
        self._memory, self._lock = memory, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def ask(self, seconds: float, **request: Any) -> Any:
        """Its answer after at most `seconds` of computing. Raises WorkerError."""
        with self._lock:
            self._start()
            return self._exchange({"seconds": seconds, **request}, seconds)

    def open(self) -> None:
        """Start it, if it is not there. Raises WorkerError where what it is to open is none."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._owner != os.getpid():  # after a fork the pipes are those of two: answers would go astray
            self._process, self._owner = None, os.getpid()
        if self._process is not None:
            return
        command = [sys.executable, "-P", str(Path(__file__).with_name("text_worker.py"))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | QUIET
        )
        weakref.finalize(self, _end, self._process)
        try:
            self._exchange(self._opening, self._opening["seconds"])
        except WorkerError:
            self._stop()
            raise

    def _exchange(self, request: dict[str, Any], seconds: float) -> Any:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps(request | {"wall": WALL * seconds}).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = b""
        except BaseException:  # an interrupt: what it would still answer belongs to no later question
            self._stop()
            raise
        if not line.endswith(b"\n"):
            raise WorkerError(self._ended(seconds))
        answer = json.loads(line)
        if "answer" in answer:
            return answer["answer"]
        raise WorkerError(answer.get("error") or self._too_much())

    def _ended(self, seconds: float) -> str:
        code = self._stop(patience=10)  # it is ending already
        if code == -SIGPROF:
            return f"it computes for more than {seconds:g} s"
        if code == -SIGALRM:
            return f"it takes more than {WALL * seconds:g} s"
        return f"it ends its process ({code}), or needs more than {self._memory // MIB} MiB"

    def _too_much(self) -> str:
        return f"it needs more than {self._memory // MIB} MiB"

    def _stop(self, patience: float = 0.2) -> int:
        process, self._process = self._process, None
        return _end(process, patience) if process is not None else 0


def _end(process: subprocess.Popen[bytes], patience: float = 0.2) -> int:
    """Wait `patience` seconds for its end, then end it; its exit code."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # what was not sent is not wanted any more
                stream.close()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
