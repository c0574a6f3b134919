"""Reserved weight files: created at their final size, with their headers, before a weight is read."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from fxquant.errors import StoppedError
from fxquant.lowering.output_folder.layout import FileLayout
from fxquant.storage.system_errors import stopping
from fxquant.storage.whole_calls import write_at
from fxquant.storage.work_folder import walk

FREE_SPACE = "Free space, or choose another -o."


def check_space(files: Sequence[FileLayout], folder: Path) -> None:
    """Raise StoppedError unless the planned files fit on the disk of `folder`."""
    with stopping(folder, "cannot be examined"):
        needed, free = sum(file.nbytes for file in files), shutil.disk_usage(folder).free
    if needed > free:
        raise StoppedError(folder, f"{needed:,} bytes to write, {free:,} free.", FREE_SPACE)


def reserve(files: Sequence[FileLayout], folder: Path) -> None:
    """Create every file in `folder`; where space can be reserved, no later write to them finds the disk full."""
    for file in files:
        _reserve(folder / file.name, file)


def _reserve(path: Path, file: FileLayout) -> None:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        fact, remedy = f"cannot be created: {error.strerror}.", "Raise --max-shard-size, for fewer files, or the limit."
        raise StoppedError(path, fact, remedy) from None
    try:
        getattr(os, "posix_fallocate", _extend)(handle, 0, file.nbytes)  # ftruncate would leave holes
        write_at(handle, file.header, 0)
    except OSError as error:
        fact = f"cannot reserve {file.nbytes:,} bytes: {error.strerror}."
        raise StoppedError(path, fact, FREE_SPACE) from None
    finally:
        os.close(handle)


def _extend(handle: int, start: int, length: int) -> None:
    """Extend a file on systems that cannot reserve space."""
    os.ftruncate(handle, start + length)


def sync(folder: Path) -> None:
    """Sync every file of `folder`, and the folders themselves, to disk."""
    with stopping(folder, "cannot be listed"):
        paths = [*walk(folder), folder]
    for path in paths:
        with stopping(path, "cannot be synced to disk"):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
