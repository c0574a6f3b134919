"""pread and pwrite in full: repeated until every byte is done, since one system call may transfer only a part."""

import os


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`. Raises OSError."""
    view, done = memoryview(data), 0
    while done < len(view):
        done += os.pwrite(handle, view[done:], offset + done)


def read_at(handle: int, length: int, offset: int) -> bytes:
    """Read `length` bytes at `offset`, fewer only at the end of the file. Raises OSError."""
    parts, done = [], 0
    while done < length and (part := os.pread(handle, length - done, offset + done)):
        parts.append(part)
        done += len(part)
    return b"".join(parts)
