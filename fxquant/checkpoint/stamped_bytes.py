"""Stamped reader: checkpoint bytes by pread, from files that must not change while work is in progress."""

import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.model_parallel_parts import SourceTensor
from fxquant.errors import StoppedError
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.safetensors import header_bytes, pread

AGAIN = "Restore the original file."
PREFETCH = 32 << 20
"""Bytes of a tensor requested ahead of use."""


@dataclass(frozen=True)
class FileStamp:
    """The state of a file, obtained without reading its tensors.

    header    XXH3-128 of its safetensors header, in hex
    size      bytes
    mtime_ns  modification time reported by the file system
    """

    header: str
    size: int
    mtime_ns: int


Stamps = Mapping[Path, FileStamp]


def stamp_files(files: Iterable[Path]) -> dict[Path, FileStamp]:
    """The state of each file."""
    return {file: _stamp(file) for file in sorted(set(files))}


def _stamp(file: Path) -> FileStamp:
    try:
        status = file.stat()
        return FileStamp(hash_bytes(header_bytes(file)), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise StoppedError(file, f"cannot be read: {error.strerror}.", AGAIN) from None


def checkpoint_files(checkpoint: Checkpoint) -> set[Path]:
    """Every file that holds a tensor or block scale of the checkpoint."""
    tensors = [*checkpoint.tensors.values(), *checkpoint.scales.values()]
    return {part.file for tensor in tensors for part in tensor.parts}


class StampedBytes:
    """Reads byte ranges of tensors into a caller's buffer. Thread-safe and picklable: it remembers the working folder,
    which may differ in another process."""

    def __init__(self, stamps: Stamps) -> None:
        self._stamps, self._folder = stamps, Path.cwd()

    def read_into(self, tensor: SourceTensor, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `offset` within `tensor`. Raises StoppedError if a file cannot be read or
        has changed since it was stamped."""
        done = 0
        with ExitStack() as stack:
            handles: dict[Path, int] = {}
            for part, start, length in tensor.ranges(offset, len(buffer)):
                if part.file not in handles:
                    handles[part.file] = self._open(part.file)
                    stack.callback(os.close, handles[part.file])
                pread(handles[part.file], buffer[done : done + length], part.start + start, part)
                done += length

    def prefetch(self, tensor: SourceTensor) -> None:
        """Ask the kernel to read the tensor ahead into its page cache."""
        for part in tensor.parts:
            with suppress(OSError):  # only a hint: the read itself reports errors
                handle = os.open(self._folder / part.file, os.O_RDONLY)
                try:
                    os.posix_fadvise(handle, part.start, min(part.nbytes, PREFETCH), os.POSIX_FADV_WILLNEED)
                finally:
                    os.close(handle)

    def read(self, tensor: SourceTensor) -> bytearray:
        """Read all bytes of a small tensor."""
        data = bytearray(tensor.nbytes)
        self.read_into(tensor, 0, memoryview(data))
        return data

    def _open(self, file: Path) -> int:
        stamp = self._stamps[file]
        try:
            handle = os.open(self._folder / file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise StoppedError(file, f"cannot be opened again: {error.strerror}.", AGAIN) from None
        status = os.fstat(handle)  # of the open file: its path may be replaced at any time
        if (status.st_size, status.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
            os.close(handle)
            raise StoppedError(file, "changed while it was being read.", "Start over with --restart.")
        return handle
