"""Child process of a model.py: the file may print, crash or hang, and only its graph comes back."""

import os
import signal
import sys
from pathlib import Path
from urllib.parse import unquote_to_bytes

from fxquant.errors import FxquantError
from fxquant.frontend.traced import Traced
from fxquant.inputs.json_file import parse_json
from fxquant.inputs.limits import ANSWER_BYTES
from fxquant.processes.command import Ended, run_to_end

MAIN = "fxquant.frontend.child_main"
SMALLER = "Look for an endless loop or a download, or raise --trace-timeout."


def trace_in_child(file: Path, checkpoint: Path | None, timeout: float) -> Traced:
    """Import, build, check and trace `file` in a separate process, for at most `timeout` seconds.

    Raises the FxquantError that was raised there, or another if the process dies or takes too long.
    """
    answer = os.memfd_create("fxquant-answer")  # in memory: no folder for temporary files is needed
    try:
        arguments = [str(file), str(answer), *([str(checkpoint)] if checkpoint else [])]
        # -P: files in the current folder must not shadow packages
        command = [sys.executable, "-P", "-m", MAIN, *arguments]
        return _read(file, answer, run_to_end(command, timeout, (answer,), _environment()))
    except TimeoutError:
        fact = f"not imported, built and traced within {timeout:g} seconds."
        raise FxquantError(file, fact, SMALLER) from None
    finally:
        os.close(answer)


def _environment() -> dict[str, str]:
    paths = [path for path in (os.environ.get("PYTHONPATH"), str(Path(__file__).parents[2])) if path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _read(file: Path, answer: int, ended: Ended) -> Traced:
    size = os.fstat(answer).st_size
    if size > ANSWER_BYTES:
        fact = f"its process returned {size:,} bytes, at most {ANSWER_BYTES:,} are read."
        raise FxquantError(file, fact, "Look for layers that all differ, or a loop that the trace unrolls.")
    data = os.pread(answer, size, 0)
    if not data.endswith(b"\n"):  # the newline is written last: without it the answer is cut off
        raise FxquantError(file, _how(ended), "A model.py must not exit or kill its process.")
    match parse_json(data, file):
        case {"error": [str(place), str(fact), str(remedy)]}:
            raise FxquantError(place, fact, remedy)
        case {
            "program": str(text),
            "checkpoint": str(folder),
            "policy": str() | None as policy,
            "input_kind": str(input_kind),
        }:
            return Traced(text, Path(os.fsdecode(unquote_to_bytes(folder))), policy, input_kind)
        case _:
            fact = "its process returned something other than a graph."
            raise FxquantError(file, fact, "A model.py must not use file descriptors that it did not open.")


def _how(ended: Ended) -> str:
    status = f"was killed by {_signal(-ended.status)}" if ended.status < 0 else f"ended with exit status {ended.status}"
    return f"its process {status}: {ended.last_line or 'no message'}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
