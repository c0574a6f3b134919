"""Worker process for untrusted text code (chat templates, tokenizers), with bounded time and memory."""

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
"""One thread, as the stack of every thread counts toward the memory limit; no Rust backtraces."""


class WorkerError(Exception):
    """The failure of the untrusted code, as a clause of an error message."""


class BoundedWorker:
    """One `text_worker` process, started on first use and again after it had to be killed.

    what     "template" or "tokenizer"; `source` holds the template's text or the tokenizer's file
    memory   limit in bytes of the whole process
    seconds  CPU limit for opening the source
    """

    def __init__(self, what: str, memory: int, seconds: float, **opened: str) -> None:
        self._opening: dict[str, Any] = {"open": what, "memory": memory, "seconds": seconds, **opened}
        self._memory, self._lock = memory, threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()

    def ask(self, seconds: float, **request: Any) -> Any:
        """The answer to a request, within `seconds` of CPU time. Raises WorkerError."""
        with self._lock:
            self._start()
            return self._exchange({"seconds": seconds, **request}, seconds)

    def open(self) -> None:
        """Start the process if it is not running. Raises WorkerError if its source cannot be opened."""
        with self._lock:
            self._start()

    def _start(self) -> None:
        if self._owner != os.getpid():  # forked: two processes on one pipe would take each other's answers
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
        except BaseException:  # interrupted: a late answer must not be taken for that of the next request
            self._stop()
            raise
        if not line.endswith(b"\n"):
            raise WorkerError(self._ended(seconds))
        answer = json.loads(line)
        if "answer" in answer:
            return answer["answer"]
        raise WorkerError(answer.get("error") or self._too_much())

    def _ended(self, seconds: float) -> str:
        code = self._stop(patience=10)  # it is exiting already: wait for its exit code
        if code == -SIGPROF:
            return f"it exceeds {seconds:g} s of CPU time"
        if code == -SIGALRM:
            return f"it exceeds {WALL * seconds:g} s"
        return f"its process ended ({code}), possibly for lack of memory (limit {self._memory // MIB} MiB)"

    def _too_much(self) -> str:
        return f"it needs more than {self._memory // MIB} MiB"

    def _stop(self, patience: float = 0.2) -> int:
        process, self._process = self._process, None
        return _end(process, patience) if process is not None else 0


def _end(process: subprocess.Popen[bytes], patience: float = 0.2) -> int:
    """Wait up to `patience` seconds for the process to exit, then kill it; its exit code."""
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(OSError):  # closing flushes, and the reader may be gone
                stream.close()
    try:
        return process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
