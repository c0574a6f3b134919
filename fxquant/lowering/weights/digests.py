"""Digests, XXH3-128, of bytes on disk, unit by unit and file by file."""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import xxhash

from fxquant.lowering.weights.unit import Filled, Place, Unit
from fxquant.storage.system_errors import stopping

READ_BLOCK = 4 << 20


def file_digest(path: Path, start: int = 0, length: int | None = None) -> str:
    """Digest of `length` bytes from `start`, in hex; None: to the end. Raises OSError."""
    digest, left = xxhash.xxh3_128(), path.stat().st_size - start if length is None else length
    buffer = memoryview(bytearray(min(READ_BLOCK, max(left, 0))))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while left > 0 and (count := file.readinto(buffer[: min(len(buffer), left)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def digests_on_disk(units: Iterable[Unit], folder: Path) -> Iterator[tuple[Unit, Filled]]:
    """Each unit as stored in `folder`. Threads hash several at a time: hashing and reading release the GIL."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(lambda unit: (unit, unit_on_disk(unit, folder)), units)


def unit_on_disk(unit: Unit, folder: Path) -> Filled:
    """The unit as stored in `folder`."""
    with stopping():
        return Filled(unit.name, {suffix: _digest(folder, place) for suffix, place in unit.places.items()})


def _digest(folder: Path, place: Place) -> str:
    if place.runs is None:
        return file_digest(folder / place.file, place.offset, place.nbytes)
    digest = xxhash.xxh3_128()
    with (folder / place.file).open("rb", buffering=READ_BLOCK) as file:
        for offset, length in place.ranges(0, place.nbytes):
            file.seek(offset)
            digest.update(file.read(length))
    return digest.hexdigest()
