"""The process of a model.py, forked from one that has imported everything: 3 seconds less than one that starts.

For tests whose subject is not that process: tests/frontend/test_model_process.py and commands of a real command line
start it as users do.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from forked import renew_threads

from fxquant.frontend import child, child_main
from fxquant.processes.command import Ended, drained, run_to_end

PYTHONPATH = os.environ.get("PYTHONPATH")


@contextmanager
def forked_children() -> Iterator[None]:
    """Model files are traced so, unless PYTHONPATH says that other packages are meant."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "run_to_end", _run_to_end)
        yield


def _run_to_end(
    command: Sequence[str], seconds: float, handles: Sequence[int] = (), environment: Mapping[str, str] | None = None
) -> Ended:
    """As `run_to_end`, of the child's own command: [python, -P, -m, module, MODEL.py, ANSWER, CHECKPOINT]."""
    if os.environ.get("PYTHONPATH") != PYTHONPATH:
        return run_to_end(command, seconds, handles, environment)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _work(command[4:], writing, environment or {})
    os.close(writing)
    tail = bytearray()
    with os.fdopen(reading, "rb", buffering=0) as stream:
        thread = drained(stream, tail)
        try:
            status = _status(pid, seconds)
        finally:
            _kill_session(pid)
        thread.join(1.0)
    if status is None:
        raise TimeoutError(f"still running after {seconds:g} seconds")
    return Ended(os.waitstatus_to_exitcode(status), bytes(tail))


def _status(pid: int, seconds: float) -> int | None:
    ended: list[int] = []
    waiting = threading.Thread(target=lambda: ended.append(os.waitpid(pid, 0)[1]), daemon=True)
    waiting.start()
    waiting.join(seconds)
    if not ended:
        _kill_session(pid)
        waiting.join()
        return None
    return ended[0]


def _kill_session(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _work(arguments: Sequence[str], output: int, environment: Mapping[str, str]) -> None:
    """In the fork: what `python -P -m fxquant.frontend.child_main` does. Never returns."""
    code = 1
    try:
        os.setsid()
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, closefd=False) for number, mode in enumerate("rww")
        )
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = [str(child_main.__file__), *arguments]
        renew_threads()
        file, answer, *checkpoint = arguments
        child_main.main(Path(file), int(answer), Path(checkpoint[0]) if checkpoint else None)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
