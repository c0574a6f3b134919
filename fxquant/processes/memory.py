"""Memory of this process, as Linux counts it, and the errors that say there is no more."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fxquant.errors import FxquantError

FAILED = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "bad_alloc")
"""What torch, its file mappings and onnxruntime say in errors of their own."""


def resident_bytes() -> int:
    """What is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """Its maximum so far; `ru_maxrss` would count the process that started this one."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def return_freed_memory() -> None:
    """Return the heap's free pages to the system: glibc keeps those below what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def lacks_memory(error: BaseException) -> bool:
    """Whether it is Python's or numpy's error, or one that torch or onnxruntime raises when its allocators fail."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in FAILED)


@contextmanager
def memory_for(place: str, remedy: str) -> Iterator[None]:
    """Raises FxquantError(place, …, remedy) in place of errors for want of memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        fact = f"there is not enough memory: at {resident_bytes() / 1e9:.1f} GB the next allocation failed."
        raise FxquantError(place, fact, remedy) from error
