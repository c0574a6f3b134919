"""The process in which a user's model.py runs: it may print, crash or never end, and only its graph comes back."""

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
SMALLER = "Look for a loop without end or a download; a larger --trace-timeout gives it longer."


def trace_in_child(file: Path, checkpoint: Path | None, timeout: float) -> Traced:
    """Import, build, check and trace `file` in a process of its own, for at most `timeout` seconds.

    Raises the FxquantError that the file earns there, or one of its own if the process dies or takes too long.
    """
    answer = os.memfd_create("fxquant-answer")  # in memory: no folder for temporary files is needed
    try:
        arguments = [str(file), str(answer), *([str(checkpoint)] if checkpoint else [])]
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
        fact = f"its process handed back {size:,} bytes, at most {ANSWER_BYTES:,} are read."
        raise FxquantError(file, fact, "Look for layers that all differ, or a loop that the trace unrolls.")
    data = os.pread(answer, size, 0)
    if not data.endswith(b"\n"):
        raise FxquantError(file, _how(ended), "A model.py must not exit, and must leave its process alive.")
    match parse_json(data, file):
        case {"error": [str(place), str(fact), str(remedy)]}:
            raise FxquantError(place, fact, remedy)
        case {"program": str(text), "checkpoint": str(folder), "policy": str() | None as policy, "way_in": str(way_in)}:
            return Traced(text, Path(os.fsdecode(unquote_to_bytes(folder))), policy, way_in)
        case _:
            fact = "its process handed back something else than a graph."
            raise FxquantError(file, fact, "A model.py must leave the file descriptors of its process alone.")


def _how(ended: Ended) -> str:
    status = f"was ended by {_signal(-ended.status)}" if ended.status < 0 else f"ended with exit status {ended.status}"
    return f"its process {status}: {ended.last_line or 'no message'}"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
