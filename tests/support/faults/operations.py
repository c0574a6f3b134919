"""Python's operations on files, counted, and one of them made to fail.

Counted are calls on paths and open files under one folder: `os` functions, and `open` with its reads, writes and
closes as the raw file sees them. What libraries do in C or Rust is not.
"""

import builtins
import errno
import fcntl
import io
import os
import shutil
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any


class Fault(StrEnum):
    """What happens at the operation: the process ends, the disk is full from then on, one call fails, or does half."""

    KILL = "KILL"
    INT = "INT"
    TERM = "TERM"
    FULL = "ENOSPC"
    BROKEN = "EIO"
    SHORT = "short"


SIGNALS = {Fault.KILL: signal.SIGKILL, Fault.INT: signal.SIGINT, Fault.TERM: signal.SIGTERM}
READS = ("read", "pread", "preadv", "readv", "sendfile", "copy_file_range")
WRITES = ("write", "pwrite", "pwritev", "writev", "sendfile", "copy_file_range")
SPACE = (*WRITES, "create", "mkdir", "posix_fallocate", "ftruncate", "truncate", "symlink", "link", "fsync")
"""What a full disk refuses."""
PATHS = ("rename", "replace", "unlink", "remove", "mkdir", "rmdir", "symlink", "link", "truncate", "scandir", "listdir")
HANDLES = ("fsync", "fdatasync", "ftruncate", "posix_fallocate", "write", "pwrite", "pwritev", "read", "pread",
           "preadv", "copy_file_range", "sendfile", "close")  # fmt: skip


@dataclass
class Injector:
    """`fault` at operation number `at` (from zero) of those under `folder`; `log` has the kinds of all so far."""

    folder: Path
    at: int = -1
    fault: Fault | None = None
    log: list[str] = field(default_factory=list)
    full: bool = False

    def __post_init__(self) -> None:
        self.root = str(self.folder.resolve())
        self.lock = threading.Lock()
        self.active = True

    def install(self) -> None:
        """For the rest of this process."""
        for name in PATHS:
            setattr(os, name, self._on_path(name, getattr(os, name)))
        for name in HANDLES:
            setattr(os, name, self._on_handle(name, getattr(os, name)))
        os.open = self._open_handle(os.open)  # type: ignore[assignment]
        fcntl.flock = self._on_handle("flock", fcntl.flock)  # type: ignore[assignment]
        builtins.open = io.open = self._open_file(io.open)  # type: ignore[assignment]
        shutil.disk_usage = self._on_path("disk_usage", shutil.disk_usage)  # type: ignore[assignment]

    def meet(self, kind: str) -> bool:
        """Count one operation, and be the fault where it is the one. True: do half of it."""
        with self.lock:
            if not self.active:
                return False
            number = len(self.log)
            self.log.append(kind)
            if self.full and kind in SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if number != self.at or self.fault is None:
                return False
            if self.fault is Fault.FULL:
                self.full = True
        if self.fault is Fault.SHORT:
            return True
        if self.fault in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.fault])
            return False
        number = errno.ENOSPC if self.fault is Fault.FULL else errno.EIO
        raise OSError(number, os.strerror(number))

    def under(self, path: Any) -> bool:
        """Whether a path or an open file lies in the folder."""
        try:
            if isinstance(path, int):
                path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115
            real = os.path.abspath(os.fsdecode(path))  # noqa: PTH100
        except (OSError, TypeError):
            return False
        return real == self.root or real.startswith(self.root + os.sep)

    def _on_path(self, name: str, original: Callable) -> Callable:
        def counted(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("dir_fd") is not None or (isinstance(path, int) and name in ("scandir", "listdir")):
                inside = self.under(kwargs["dir_fd"] if kwargs.get("dir_fd") is not None else path)
            else:
                inside = self.under(path)
            if inside:
                self.meet(name)
            return original(path, *args, **kwargs)

        return counted

    def _on_handle(self, name: str, original: Callable) -> Callable:
        def counted(handle: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.under(handle if isinstance(handle, int) else handle.fileno()):
                return original(handle, *args, **kwargs)
            if name == "close":
                original(handle)  # whatever close says, the handle is gone
                self.meet(name)
                return None
            if self.meet(name):
                args = _halved(name, args)
            return original(handle, *args, **kwargs)

        return counted

    def _open_handle(self, original: Callable) -> Callable:
        def counted(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            place = kwargs["dir_fd"] if kwargs.get("dir_fd") is not None else path
            if self.under(place):
                self.meet("create" if flags & os.O_CREAT else "open")
            return original(path, flags, *args, **kwargs)

        return counted

    def _open_file(self, original: Callable) -> Callable:
        def counted(
            file: Any, mode: str = "r", buffering: int = -1, encoding: str | None = None, errors: str | None = None,
            newline: str | None = None, closefd: bool = True, opener: Any = None,
        ) -> Any:  # fmt: skip
            if isinstance(file, int) or not self.under(file):
                return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
            self.meet("create" if set(mode) & set("wxa") else "open")
            raw = _CountedFile(file, mode.replace("b", "").replace("t", ""), self, opener)
            if buffering == 0:
                return raw
            kind = io.BufferedRandom if "+" in mode else io.BufferedReader if "r" in mode else io.BufferedWriter
            buffer = kind(raw)
            if "b" in mode:
                return buffer
            text = io.TextIOWrapper(buffer, io.text_encoding(encoding), errors, newline)
            text.mode = mode
            return text

        return counted


class _CountedFile(io.FileIO):
    """A raw file whose reads, writes and close are operations."""

    def __init__(self, file: Any, mode: str, injector: Injector, opener: Any) -> None:
        super().__init__(file, mode, opener=opener)
        self._injector, self._closing = injector, False

    def readinto(self, buffer: Any) -> int:
        half = self._injector.meet("read") and len(buffer) > 1
        return super().readinto(memoryview(buffer)[: len(buffer) // 2] if half else buffer) or 0

    def read(self, size: int | None = -1) -> bytes:
        if size is None or size < 0:
            return self.readall()
        half = self._injector.meet("read") and size > 1
        return super().read(size // 2 if half else size) or b""

    def readall(self) -> bytes:
        parts = []
        while part := self.read(1 << 20):
            parts.append(part)
        return b"".join(parts)

    def write(self, data: Any) -> int:
        half = self._injector.meet("write") and len(data) > 1
        return super().write(memoryview(data).cast("B")[: len(data) // 2] if half else data) or 0

    def truncate(self, size: int | None = None) -> int:
        self._injector.meet("truncate")
        return super().truncate(size)

    def close(self) -> None:
        if self.closed or self._closing:
            super().close()
            return
        self._closing = True
        super().close()
        self._injector.meet("close")


def _halved(name: str, args: tuple) -> tuple:
    """The arguments of a call that does half of what it was asked for."""
    if name in ("write", "pwrite"):
        data = memoryview(args[0]).cast("B")
        return (data[: max(1, len(data) // 2)], *args[1:])
    if name in ("read", "pread"):
        return (max(1, args[0] // 2), *args[1:])
    if name == "preadv":
        view = memoryview(args[0][0]).cast("B")
        return ([view[: max(1, len(view) // 2)]], *args[1:])
    if name == "copy_file_range":
        return (args[0], max(1, args[1] // 2), *args[2:])
    return (*args[:2], max(1, args[2] // 2)) if name == "sendfile" else args
