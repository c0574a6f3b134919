"""Filling of one unit: its pieces are written to their places, each hashed while it is in the CPU cache."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import xxhash

from fxquant.errors import StoppedError
from fxquant.lowering.weights.producer import Producer
from fxquant.lowering.weights.unit import Filled, Unit
from fxquant.storage.whole_calls import write_at

FREE_SPACE = "Free space or repair the disk."


@dataclass(frozen=True)
class FillJob:
    """The input of every worker: the folder of reserved files, and the producer of bytes. Pickled for Ray workers."""

    folder: Path
    producer: Producer

    def fill(self, unit: Unit) -> Filled:
        """Write the unit. Repeating it writes the same bytes to the same places. Raises FxquantError."""
        with ExitStack() as stack:
            files = sorted({place.file for place in unit.places.values()})
            handles = {file: self._open(file, stack) for file in files}

            def write(suffix: str, data: memoryview, done: int) -> None:
                place = unit.places[suffix]
                first = 0
                for offset, length in place.ranges(done, len(data)):
                    self._write(handles[place.file], data[first : first + length], offset, place.file)
                    first += length

            return _pour(unit, self.producer, write)

    def _open(self, file: str, stack: ExitStack) -> int:
        try:
            # not O_CREAT: on a machine without the shared storage the reserved file is missing, and that must show
            handle = os.open(self.folder / file, os.O_WRONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise StoppedError(self.folder / file, f"cannot be opened: {error.strerror}.", FREE_SPACE) from None
        stack.callback(os.close, handle)
        return handle

    def _write(self, handle: int, data: memoryview, offset: int, file: str) -> None:
        try:
            write_at(handle, data, offset)
        except OSError as error:
            raise StoppedError(self.folder / file, f"cannot be written: {error.strerror}.", FREE_SPACE) from None


def unit_anew(unit: Unit, producer: Producer) -> Filled:
    """The unit as filling it would write it, hashed but not written."""
    return _pour(unit, producer, lambda suffix, data, done: None)


def _pour(unit: Unit, producer: Producer, write: Callable[[str, memoryview, int], None]) -> Filled:
    """Hash every piece and pass it to `write`, with its suffix and the number of that tensor's bytes before it."""
    done = dict.fromkeys(unit.places, 0)
    digests = {suffix: xxhash.xxh3_128() for suffix in unit.places}
    for suffix, data in producer.pieces(unit):
        write(suffix, data, done[suffix])
        digests[suffix].update(data)
        done[suffix] += len(data)
    planned = {suffix: place.nbytes for suffix, place in unit.places.items()}
    if done != planned:
        raise AssertionError(f"{unit.name}: made {done} bytes, planned {planned}")
    return Filled(unit.name, {suffix: digest.hexdigest() for suffix, digest in digests.items()})
