"""Process of a patched copy: python patched_process.py ERRORS runs what `python` is asked for, one after the other.

A line of its input is a JSON list: a file for what is printed, a file for errors, and the arguments of `python`. A line
of its output is the exit code. Traces, texts and reference codes of equal arguments are remembered between commands.
"""

import gc
import json
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

YOUNG = 20_000
"""New objects after which garbage is looked for, as in the tests themselves (tests/conftest.py)."""


def main() -> None:
    """Answer until the input ends."""
    gc.disable()  # imports stay
    from kept import Kept
    from remembered import computed_once, traced_once

    gc.freeze()
    gc.set_threshold(YOUNG, 20, 20)
    gc.enable()

    answers, questions = os.fdopen(os.dup(1), "w"), os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with traced_once(), computed_once(Kept(Path("kept").absolute())):
        for line in questions:
            printed, errors, *arguments = json.loads(line)
            print(_ended(printed, errors, arguments), file=answers, flush=True)


def _ended(printed: str, errors: str, arguments: list[str]) -> int:
    for number, name in ((1, printed), (2, errors)):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    try:
        _run(arguments)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _run(arguments: list[str]) -> None:
    """`python ARGUMENTS`: -m MODULE, -c CODE or a file, each with what it gets."""
    how, rest = arguments[0], arguments[1:]
    if how == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.argv = ["-c", *rest[1:]]
        names: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(rest[0], "<string>", "exec"), names)
    else:
        sys.argv = arguments
        runpy.run_path(how, run_name="__main__")


if __name__ == "__main__":
    main()
