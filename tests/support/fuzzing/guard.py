"""What a reader must not do: run code, start processes, talk to a network, write outside its folder, hang, or take it
all.

Audit events are Python's: what a library does in C or Rust is not seen here, but its files and its memory are.
"""

import dataclasses
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch

SECONDS = 10
"""Longest that a case may take."""
LARGEST = 2 << 30
"""Bytes of memory that a process may take."""
MUTATING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod",
            "os.chown", "os.setxattr")  # fmt: skip
PROCESSES = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn",
             "subprocess.Popen")  # fmt: skip
OTHERS = ("ctypes.dlopen", "pickle.find_class", "webbrowser.open")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PACKAGES = Path(torch.__file__).parents[1]
TRUSTED = (sys.prefix, sys.base_prefix, str(PACKAGES), str(Path(__file__).resolve().parents[3]), "<frozen ")


class Hang(BaseException):
    """A case that took too long."""


class Guard:
    """Watches the process from `install` on, while `watching`; `violations` are what happened meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.violations, self.watching = str(folder.resolve()), list[str](), False
        self.allowed: tuple[str, ...] = ()

    def install(self) -> None:
        """For good: audit hooks are never taken out."""
        sys.addaudithook(self._hook)
        signal.signal(signal.SIGALRM, _alarm)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.watching and event not in self.allowed and (fact := self._fact(event, args)):
            frame = sys._getframe(2)
            self.violations.append(f"{fact}, in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}")

    def _fact(self, event: str, args: tuple[Any, ...]) -> str:
        if event == "open":
            return f"writes {args[0]!r}" if (args[2] or 0) & WRITING and self._outside(args[0]) else ""
        if event in MUTATING:
            there = [path for path in args[:2] if isinstance(path, str | bytes | os.PathLike)]
            return f"{event} {there}" if any(map(self._outside, there)) else ""
        if (
            event == "exec" and sys._getframe(2).f_code.co_filename != dataclasses.__file__
        ):  # of a class that is trusted
            code = args[0]
            name = code.co_filename.rstrip("0123456789") if isinstance(code, CodeType) else "a text"
            return "" if name.startswith(TRUSTED) or Path(name).name in self.allowed else f"runs code of {name}"
        return f"{event} {args!r:.200}" if event in PROCESSES + OTHERS or event.startswith("socket.") else ""

    def _outside(self, path: Any) -> bool:
        if isinstance(path, int):
            return False
        real = os.path.realpath(os.fsdecode(path))
        return real != os.devnull and real != self.folder and not real.startswith(self.folder + os.sep)

    @contextmanager
    def watch(self, allowed: tuple[str, ...]) -> Iterator[None]:
        """Of one case: violations are noted, and `Hang` is raised when its time is over. `allowed`: events, or names
        of files of code."""
        self.allowed, self.violations = allowed, []
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_REAL, 0)


def _alarm(number: int, frame: FrameType | None) -> None:
    raise Hang(f"more than {SECONDS} seconds")


def limit_memory() -> None:
    """Allocations fail beyond `LARGEST` bytes more than are mapped now, less what is in memory now."""
    mapped, resident = (
        int(pages) * resource.getpagesize() for pages in Path("/proc/self/statm").read_text().split()[:2]
    )
    limit = mapped + LARGEST - resident
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def largest_memory() -> int:
    """The most bytes that this process ever had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def now() -> float:
    """Seconds, for differences."""
    return time.monotonic()
