"""Entry point of a model.py's child process: runs `trace_file` and writes its graph or its error as the answer.

python -m fxquant.frontend.child_main MODEL.py ANSWER [CHECKPOINT], where ANSWER is an open file descriptor.
"""

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

from fxquant.errors import FxquantError
from fxquant.processes.command import end_with


def main(file: Path, answer: int, checkpoint: Path | None) -> None:
    """Trace `file`, and write the program or the error as one line of JSON; its newline shows that it is complete."""
    from fxquant.frontend.build import trace_file  # imports torch: after `end_with`, so that it ends with its parent

    gc.disable()  # it would look at the 180,000 modules of a large model again and again, and the process is short
    own = os.getpid()
    os.set_inheritable(answer, False)  # programs that the file starts must not write to it
    try:
        traced = trace_file(file, checkpoint)
        content: dict[str, Any] = {
            "program": traced.program,
            "checkpoint": quote_from_bytes(os.fsencode(traced.checkpoint)),
            "policy": traced.policy,
            "input_kind": traced.input_kind,
        }
    except FxquantError as error:
        content = {"error": [_writable(text) for text in (error.place, error.fact, error.remedy)]}
    except Exception as error:
        content = {"error": [_writable(text) for text in (str(file), *_unexpected(error))]}
    if os.getpid() == own:  # a fork of the file must not answer
        with os.fdopen(answer, "wb") as stream:
            stream.write(json.dumps(content, default=str).encode() + b"\n")


def _unexpected(error: Exception) -> tuple[str, str]:
    """Fact and remedy for what fxquant did not foresee, with the place in its own code."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    fact = f"fxquant fails on its model: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})."
    return fact, "This is an error of fxquant, not of the file: please report it with the file."


def _writable(text: str) -> str:
    """File names may not be valid UTF-8."""
    return text.encode(errors="backslashreplace").decode()


if __name__ == "__main__":
    end_with(os.getppid())
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]) if len(sys.argv) > 3 else None)
