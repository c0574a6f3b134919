"""Error boundary: whatever ends a command becomes one screen and an exit code; see docs/command-line.md."""

import sys
from collections.abc import Callable
from contextlib import suppress

from fxquant.errors import FxquantError
from fxquant.processes.memory import lacks_memory
from fxquant.storage.system_errors import stopped
from fxquant.tools.console import errors, exit_quietly_on_stdout, print_line, show_error
from fxquant.tools.faults import show_fault, words
from fxquant.tools.signals import WORDS, Signals, exit_code

DONE, REFUSED, FAULT, INTERRUPTED, PIPE_CLOSED = 0, 1, 70, 130, 141
NOTHING_YET = "Nothing had been written to its output."
RESUMED = ("compile", "convert")
"""Verbs that leave work to resume."""
LOWER = "Use a machine with more, or lower one of --jobs, --batch-size, --samples, --seq-len."


class Ended(BaseException):
    """Carries an interrupt or a closed pipe past typer, which would handle them itself.

    verb  the command that it ended
    """

    def __init__(self, error: BaseException, verb: str) -> None:
        super().__init__(error, verb)
        self.error, self.verb = error, verb


def guarded(action: Callable[[], object], signals: Signals) -> int:
    """Run `action` and return the exit code; errors are printed on stderr. Never raises."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a locale without our symbols, a path that is not valid text
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _code(action)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BaseException as error:  # a panic in Rust is not an Exception
        with suppress(OSError):  # stderr is closed or full: only the exit code is left
            return _ended(error, signals)
        return exit_code(signals.received) if signals.received else REFUSED


def _code(action: Callable[[], object]) -> int:
    try:
        action()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:  # typer turns an interrupt into this exit code
            raise KeyboardInterrupt from stop
        return stop.code if isinstance(stop.code, int) else REFUSED if stop.code else DONE
    return DONE


def _ended(error: BaseException, signals: Signals) -> int:
    verb = ""
    if isinstance(error, Ended):
        verb, error = error.verb, error.error
    if signals.received or isinstance(error, KeyboardInterrupt):  # even if other code turned it into another error
        return _interrupted(error, verb, signals)
    if isinstance(error, BrokenPipeError):
        exit_quietly_on_stdout()
        return PIPE_CLOSED
    told = as_told(error)
    if told is None:
        show_fault(error)
        return FAULT
    if isinstance(error, OSError) and error.filename is None:  # may be stdout: a flush at exit would fail again
        exit_quietly_on_stdout()
    show_error(told)
    return REFUSED


def _interrupted(error: BaseException, verb: str, signals: Signals) -> int:
    word = WORDS[signals.received] if signals.received else "interrupted"
    state = getattr(error, "state", "") or (NOTHING_YET if verb in RESUMED else "")
    print_line(f"{word}. {state}".strip(), to=errors)
    return exit_code(signals.received) if signals.received else INTERRUPTED


def as_told(error: BaseException) -> FxquantError | None:
    """The error as place, fact and remedy; None if it is a fault of fxquant."""
    if isinstance(error, FxquantError):
        return error
    if lacks_memory(error):
        return FxquantError("memory", f"There is not enough: {words(error)}.", LOWER)
    if isinstance(error, OSError):
        return stopped(error, _name(error.filename2 or error.filename))
    if isinstance(error, ImportError) and not (error.name or "fxquant").startswith("fxquant"):
        return FxquantError("the installation", f"{words(error)}.", "Reinstall fxquant in its own environment.")
    return None


def _name(place: object) -> str:
    if place is None:
        return "a stream or a file"
    return place.decode(errors="backslashreplace") if isinstance(place, bytes) else str(place)
