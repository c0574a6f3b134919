"""The process in which a user's model.py runs: it may print, crash or never end, and only its graph comes back.

python -m fxquant.frontend.child MODEL.py ANSWER.json [CHECKPOINT]
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError

SMALLER = "Look for a loop without end or a download; a larger --trace-timeout gives it longer."


@dataclass(frozen=True)
class Traced:
    """What comes back: the float program as text, where its checkpoint lies, and how the model came in."""

    program: str
    checkpoint: Path
    policy: str | None
    way_in: str


def trace_in_child(file: Path, checkpoint: Path | None, timeout: float) -> Traced:
    """Import, build, check and trace `file` in a process of its own, for at most `timeout` seconds.

    Raises the FxquantError that the file earns there, or one of its own if the process dies or takes too long.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        arguments = [str(file), str(answer), *([str(checkpoint)] if checkpoint else [])]
        try:
            status, output = _run(arguments, timeout)
        except subprocess.TimeoutExpired:
            fact = f"not imported, built and traced within {timeout:g} seconds."
            raise FxquantError(file, fact, SMALLER) from None
        if not answer.is_file():
            last = output.decode(errors="replace").strip().split("\n")[-1]
            fact = f"its process ended with exit status {status}: {last or 'no message'}"
            raise FxquantError(file, fact, "A model.py must not exit, and must leave its process alive.")
        return _read(json.loads(answer.read_text(encoding="utf-8")))


def _run(arguments: list[str], timeout: float) -> tuple[int, bytes]:
    """Exit status and all that was printed. Whatever ends the wait ends the process and those that it started."""
    package = str(Path(__file__).parents[2])
    paths = [path for path in (os.environ.get("PYTHONPATH"), package) if path]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    return process.returncode, output


def _read(answer: dict[str, Any]) -> Traced:
    if "error" in answer:
        raise FxquantError(*answer["error"])
    return Traced(answer["program"], Path(answer["checkpoint"]), answer["policy"], answer["way_in"])


def main(file: Path, answer: Path, checkpoint: Path | None) -> None:
    """Trace `file` here, and write the program or the error as JSON, complete or not at all."""
    from fxquant.frontend.build import trace_file

    try:
        content: dict[str, Any] = asdict(trace_file(file, checkpoint))
    except FxquantError as error:
        content = {"error": [error.place, error.fact, error.remedy]}
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(content, default=str), encoding="utf-8")
    partial.rename(answer)


def _end_with(parent: int) -> None:
    """End this process, and those that it started, soon after `parent` is gone without a word."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
