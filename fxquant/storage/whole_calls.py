"""Reads and writes of the operating system, again and again until all is done: one call may do a part."""

import os


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """All of `data`, from byte `offset` of the file on. Raises OSError."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def read_at(handle: int, length: int, offset: int) -> bytes:
    """`length` bytes from `offset`, fewer only where the file ends. Raises OSError."""
    parts, done = [], 0
    while done < length and (part := os.pread(handle, length - done, offset + done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
