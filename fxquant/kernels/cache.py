"""Compiled kernels, kept in the user's cache folder from one process to the next. Needs numpy and numba only.

`$XDG_CACHE_HOME/fxquant/kernels/KEY/`, or `~/.cache/…`: KEY is made of what decides the code, a file is one kernel for
one signature. Files are written whole or not at all, and no process waits for another. Kept code only saves the seconds
of compiling: where nothing can be kept, or what is kept is damaged, kernels are compiled anew.
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


class KeptCode:
    """The code of one kernel by signature: what a numba dispatcher asks in place of numba's own cache.

    numba's keeps files beside the sources and reads a damaged one without a check.
    """

    def __init__(self, function: Any) -> None:
        self._name = f"{function.__module__}.{function.__qualname__}"

    @property
    def cache_path(self) -> str | None:
        """The folder, None where nothing is kept."""
        folder = code_folder()
        return str(folder) if folder else None

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled kernel, or None."""
        folder = code_folder()
        if folder is None:
            return None
        target.refresh()
        with suppress(Exception):  # whatever is wrong with it, the kernel can be compiled
            known, reduced = pickle.loads(_read(folder / self._file(signature)))
            return numba.core.compiler.CompileResult._rebuild(target, *reduced) if known == signature else None
        return None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep a compiled kernel for other processes, if there is a place for it."""
        folder = code_folder()
        with suppress(Exception):  # as on the way back
            if folder and not result.lifted and not result.library.has_dynamic_globals:  # the latter hold addresses
                _write(folder / self._file(signature), numba.core.serialize.dumps((signature, result._reduce())))

    def flush(self) -> None:
        """Nothing is forgotten: kept code is that of the sources."""

    def _file(self, signature: Any) -> str:
        return sha256(f"{self._name} {signature}".encode()).hexdigest()[:32] + ENDING


@cache
def code_folder() -> Path | None:
    """The folder of this process, made if need be; None where none can be trusted."""
    from numba.core.registry import cpu_target

    try:
        files = {file.name: file.read_bytes() for file in sorted(SOURCES.glob("*.py"))}
    except OSError:
        return None
    if not files:  # a package of compiled modules only: nothing would say when kernels change
        return None
    content = sha256(repr(files).encode()).hexdigest()
    versions = (sys.implementation.cache_tag, sys.abiflags, numba.__version__, llvmlite.__version__)
    settings = sorted(item for item in os.environ.items() if item[0].startswith("NUMBA_"))
    processor = cpu_target.target_context.codegen().magic_tuple()
    return folder_of(content, versions, settings, processor)


def _read(path: Path) -> bytes:
    """What was kept, after its digest. Raises OSError, also where it isn't as it was written."""
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
        Path(partial).rename(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise
