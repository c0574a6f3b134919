"""Signals, Ctrl-C and SIGTERM: the first ends the work in order, the second the process at once. No slow imports."""

import _thread
import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

DEFAULTS: dict[int, Any] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
SOON = 0.02
"""Seconds after which a dropped interrupt is raised again."""
WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def exit_code(number: int) -> int:
    """130 after SIGINT, 143 after SIGTERM."""
    return 128 + number


def leave(code: int) -> None:
    """End the process with this code after an interrupt.

    After an interrupt during `exec` of source text, which many packages do on import, Python would exit with the signal
    instead of this code, although the interrupt was caught.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


class Signals:
    """While open, handles in the main thread those signals that nobody else handles or ignores.

    received  the number of the first signal, 0 for none
    working   whether there is work to end in order; before, a signal ends the process at once
    """

    def __init__(self, working: bool = True) -> None:
        self.received, self.working = 0, working
        self._own: list[int] = []
        self._again = False
        self._hook = sys.unraisablehook

    def __enter__(self) -> "Signals":
        self.listen()
        return self

    def listen(self) -> None:
        """Install the handlers, for as long as the process lives."""
        if threading.current_thread() is threading.main_thread():
            self._own = [number for number, default in DEFAULTS.items() if signal.getsignal(number) == default]
        for number in self._own:
            signal.signal(number, self._receive)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._swallowed

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number in self._own:
            signal.signal(number, DEFAULTS[number])
        sys.unraisablehook = self._hook

    def _swallowed(self, unraisable: Any) -> None:
        """Raise an interrupt again that came where Python drops exceptions, such as callbacks after a fork."""
        if self.received and isinstance(unraisable.exc_value, KeyboardInterrupt):
            self._again = True
            later = threading.Timer(SOON, _thread.interrupt_main, (self.received,))  # here it would be dropped too
            later.daemon = True
            later.start()
        else:
            self._hook(unraisable)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._again:
            self._again = False
            raise KeyboardInterrupt
        if self.received or not self.working:
            cursor = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides it
            # print could wait for a lock that the interrupted code holds
            os.write(2, f"{cursor}\n{WORDS[number]}\n".encode())
            os._exit(exit_code(self.received or number))
        self.received = number
        raise KeyboardInterrupt
