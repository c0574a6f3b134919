"""Fault report of an internal error: one screen for the user, and a file with the rest."""

import os
import platform
import sys
import tempfile
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console

import fxquant
from fxquant.tools.console import errors, screen
from fxquant.tools.visible import one_line

LAST_LINES = 12
"""Lines of the traceback on the screen, if it cannot be saved."""
LONGEST = 300
"""Characters of the error on the screen."""
PACKAGES = ("torch", "numpy", "numba", "safetensors", "tokenizers", "pydantic", "typer", "rich", "onnxruntime")


def show_fault(error: BaseException, to: Console = errors) -> None:
    """Show the error in one line, the file of its traceback, and what to send."""
    text = report_text(error)
    saved = _save(text)
    state = getattr(error, "state", "")
    facts = ["This is a fault of fxquant, not of your files.", *([state] if state else []), ""]
    if saved is None:
        facts += ["The traceback could not be saved. It ends with:", *text.rstrip().splitlines()[-LAST_LINES:]]
        way_out = "Report it with these lines and the command."
    else:
        facts.append(
            "The traceback is saved in the file below, with the command and the versions of installed packages."
        )
        way_out = f"Report it with this file. It contains paths of yours: read it first.\n{saved}"
    screen("fault of fxquant", words(error), "\n".join(facts), way_out, to)


def words(error: BaseException) -> str:
    """`KeyError: 'x'`, in one line."""
    text = one_line("".join(traceback.format_exception_only(error)).strip())
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"


def report_text(error: BaseException) -> str:
    """Command, versions, traceback."""
    installed = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    lines = [
        f"fxquant {fxquant.__version__}, Python {platform.python_version()}, {platform.platform()}",
        installed,
        "command: " + one_line(" ".join(sys.argv)),
        "",
    ]
    return "\n".join(lines) + "\n" + "".join(traceback.format_exception(error))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _save(text: str) -> Path | None:
    try:
        handle, name = tempfile.mkstemp(prefix="fxquant-fault-", suffix=".txt")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return None
    return Path(name)
