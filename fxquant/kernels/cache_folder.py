"""Kernel cache folder: who must own it, and how many folders of other versions are kept.

Anyone who can write a file there can run code in our process. So our folders must belong to this user and be closed to
others; folders above must belong to this user or root, and must not be world-writable unless sticky.
"""

import os
import stat
import time
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

KEY_LETTERS, MARKER, ENDING = 24, "README.txt", ".code"
MARKER_TEXT = "Compiled code of fxquant's kernels. This folder may be deleted at any time.\n"
CACHED_KEYS = 8
"""Most recently used folders to keep: versions, environments and processors that share a home."""
DAY = 86_400.0


def folder_of(*decides: object) -> Path | None:
    """The folder keyed by `decides`, created if needed. None if it cannot be created or others could write to it.

    The repr of `decides` must be the same in every process.
    """
    try:
        root = _cache_root()
        root.mkdir(0o700, exist_ok=True)
        root = root.resolve(strict=True)
        if not all(map(_is_trusted, (root, *root.parents))):
            return None
        folder = root / "fxquant" / "kernels" / sha256(repr(decides).encode()).hexdigest()[:KEY_LETTERS]
        created = [_is_made(path) for path in (folder.parents[1], folder.parent, folder)]
        _mark(folder)
        if created[-1]:
            _clean(folder)
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        return None
    return folder


def _cache_root() -> Path:
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else Path.home() / ".cache"


def _is_trusted(path: Path) -> bool:
    about = path.stat()
    return about.st_uid in (0, os.geteuid()) and (
        not about.st_mode & stat.S_IWOTH or bool(about.st_mode & stat.S_ISVTX)
    )


def _is_made(path: Path) -> bool:
    """Create the folder; whether it is new. Raises PermissionError unless only this user can write to it."""
    created = False
    with suppress(FileExistsError):
        path.mkdir(0o700)
        created = True
    about = path.lstat()
    if not stat.S_ISDIR(about.st_mode) or not belongs_to_user(about):
        raise PermissionError(path)
    return created


def belongs_to_user(about: os.stat_result) -> bool:
    """Whether the file is this user's and nobody else can write to it."""
    return about.st_uid == os.geteuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _mark(folder: Path) -> None:
    """Write the marker file; its mtime records the last day of use."""
    marker = folder / MARKER
    with suppress(OSError):  # a read-only cache still works
        if not marker.exists():
            marker.write_text(MARKER_TEXT, encoding="ascii")
        elif time.time() - marker.stat().st_mtime > DAY:
            os.utime(marker)


def _clean(new: Path) -> None:
    """Remove our files from all but the most recently used folders; their processes then compile again."""
    marked = [marker for marker in new.parent.glob(f"*/{MARKER}") if _is_ours(marker)]
    ages: dict[Path, float] = {}
    for marker in marked:
        with suppress(OSError):
            ages[marker.parent] = marker.stat().st_mtime
    for folder in sorted(ages, key=lambda path: (path == new, ages[path]))[:-CACHED_KEYS]:
        with suppress(OSError):
            for file in (*folder.glob(f"*{ENDING}"), *folder.glob(f"*{ENDING}.*"), folder / MARKER):
                file.unlink(missing_ok=True)
            folder.rmdir()


def _is_ours(marker: Path) -> bool:
    folder = marker.parent
    named = len(folder.name) == KEY_LETTERS and set(folder.name) <= set("0123456789abcdef")
    with suppress(OSError):
        return named and not folder.is_symlink() and marker.read_text(encoding="ascii") == MARKER_TEXT
    return False
