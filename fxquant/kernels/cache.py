"""Kernel cache: compiled numba code in the user's cache folder, reused across processes. Needs numpy and numba only.

`$XDG_CACHE_HOME/fxquant/kernels/KEY/`, or `~/.cache/…`: KEY hashes everything that determines the code; a file holds
one kernel for one signature. Writes are atomic, and no process waits for another. The cache only saves compile time: if
it cannot be written, or an entry is damaged, kernels are compiled again.
"""

import os
import pickle
import stat
import sys
import tempfile
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import llvmlite
import numba

from fxquant.kernels.cache_folder import ENDING, belongs_to_user, folder_of

SOURCES = Path(__file__).parent


class CachedCode:
    """Cache of one kernel by signature, in place of the cache of a numba dispatcher.

    numba's own cache writes files beside the sources and loads damaged ones without a check.
    """

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"

    @property
    def cache_path(self) -> str | None:
        """The folder, or None if there is no cache."""
        folder = code_folder()
        return str(folder) if folder else None

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled kernel, or None."""
        folder = code_folder()
        if folder is None:
            return None
        target.refresh()
        with suppress(Exception):  # any failure just means compiling the kernel
            known, reduced = pickle.loads(_read(folder / self._file(signature)))
            return numba.core.compiler.CompileResult._rebuild(target, *reduced) if known == signature else None
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Store a compiled kernel for other processes, if there is a cache."""
        folder = code_folder()
        with suppress(Exception):  # as in load_overload
            if folder and not result.lifted and not result.library.has_dynamic_globals:  # those hold addresses
                _write(folder / self._file(signature), numba.core.serialize.dumps((signature, result._reduce())))

    def flush(self) -> None:
        """Nothing to do: the key covers the sources."""

    def _file(self, signature: Any) -> str:
        return sha256(f"{self._name} {signature}".encode()).hexdigest()[:32] + ENDING


@cache
def code_folder() -> Path | None:
    """The cache folder for this process, created if needed; None if no folder can be trusted."""
    from numba.core.registry import cpu_target

    try:
        files = {file.name: file.read_bytes() for file in sorted(SOURCES.glob("*.py"))}
    except OSError:
        return None
    if not files:  # without sources nothing would show that a kernel changed
        return None
    content = sha256(repr(files).encode()).hexdigest()
    versions = (sys.implementation.cache_tag, sys.abiflags, numba.__version__, llvmlite.__version__)
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    processor = cpu_target.target_context.codegen().magic_tuple()
    return folder_of(content, versions, settings, processor)


def _read(path: Path) -> bytes:
    """An entry, checked against its digest and owner, as unpickling runs code. Raises OSError if it is not intact."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        about = os.fstat(stream.fileno())
        if not stat.S_ISREG(about.st_mode) or not belongs_to_user(about):
            raise PermissionError(path)
        digest, data = stream.read(32), stream.read()
    if sha256(data).digest() != digest:
        raise OSError(f"{path} is damaged")
    return data


def _write(path: Path, data: bytes) -> None:
    handle, partial = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(sha256(data).digest() + data)
        Path(partial).rename(path)  # atomic: others see all of it or nothing
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
