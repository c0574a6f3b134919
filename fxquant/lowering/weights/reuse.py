"""Reuse of units of an earlier output with the same keys: the file system copies their bytes as cheaply as it can."""

import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fxquant.checkpoint.stamped_bytes import FileStamp, Stamps
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import INDEX_BYTES
from fxquant.lowering.output_folder.layout import FileLayout
from fxquant.lowering.output_folder.manifest import STAMPS, Manifest, read_manifest
from fxquant.lowering.own_files import is_plain
from fxquant.lowering.weights.digests import digests_on_disk
from fxquant.lowering.weights.producer import Producer
from fxquant.lowering.weights.unit import Filled, Place, Unit
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.safetensors import TensorInfo, header_bytes, read_header
from fxquant.storage.system_errors import stopped, stopping
from fxquant.storage.work_folder import listed

NOT_HERE = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
"""Errors of copy_file_range that mean: not supported between these files, read and write instead."""
COPY_BLOCK = 8 << 20


def save_stamps(stamps: Stamps, folder: Path) -> None:
    """Write the stamps of an output's source files into `folder`, by file name."""
    document = {file.name: asdict(stamp) for file, stamp in sorted(stamps.items())}
    with stopping(folder / STAMPS, "cannot be written"):
        (folder / STAMPS).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Earlier:
    """An output folder to reuse units of: its tensors by name, and the states that its source's files had.

    lost     weight files that are not as they were written: nothing of them is reused
    damaged  units whose bytes turned out to differ from the written ones
    """

    folder: Path
    manifest: Manifest
    tensors: dict[str, TensorInfo]
    stamps: frozenset[FileStamp]
    lost: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Messages for the user."""
        notes = [f"{self.folder / name} is not as it was written: its contents were made again" for name in self.lost]
        if self.damaged:
            notes.append(f"damaged in {self.folder} and made again from the source: {listed(set(self.damaged))}")
        return notes

    def has(self, unit: Unit, key: str, producer: Producer) -> bool:
        """Whether it has the unit that `producer` would make: the same key, from source files unchanged since."""
        record = self.manifest.units.get(unit.name)
        return (
            record is not None
            and record.key == key
            and set(record.digests) == set(unit.places)
            and all(self._fits(unit, suffix) for suffix in unit.places)
            and all(stamp in self.stamps for stamp in producer.stamps_of(unit))
        )

    def filled(self, unit: Unit) -> Filled:
        """The unit with the digests of the earlier work."""
        return Filled(unit.name, self.manifest.units[unit.name].digests)

    def _fits(self, unit: Unit, suffix: str) -> bool:
        return self.place(unit, suffix) is not None

    def place(self, unit: Unit, suffix: str) -> Place | None:
        """Where it has a tensor of the unit; None if it has none of that size, or in another stack."""
        runs, nbytes = unit.places[suffix].runs, unit.places[suffix].nbytes
        info = self.tensors.get(unit.tensor_name(suffix) if runs is None else runs.stack)
        if info is None or info.nbytes != (nbytes if runs is None else runs.size):
            return None
        return Place(info.file.name, info.start, nbytes, runs)


def open_earlier(folder: Path, replaced: bool = False) -> Earlier:
    """Open an output for reuse. Raises FxquantError unless its weight files have the headers that were written.

    `replaced`: it is the output that is replaced; damaged weight files are not an error then, but made again.
    """
    manifest = read_manifest(folder)
    tensors: dict[str, TensorInfo] = {}
    lost = []
    for name, digest in manifest.weights.items():
        path = folder / name
        try:
            if not is_plain(name) or not path.is_file() or hash_bytes(header_bytes(path)) != digest:
                raise FxquantError(path, "is not as it was written.", "Leave out --reuse, or verify that folder.")
            with stopping(path, "cannot be read"):
                tensors |= read_header(path)
        except FxquantError:
            if not replaced:
                raise
            lost.append(name)
    try:
        document = read_json(folder / STAMPS, INDEX_BYTES)
        stamps = frozenset(FileStamp(**fields) for fields in document.values())
    except (FxquantError, TypeError, AttributeError):
        stamps = frozenset()  # no source file is known to be unchanged, so no unit is reused
    return Earlier(folder, manifest, tensors, stamps, lost)


def copy_units(
    earlier: Earlier, units: Sequence[Unit], files: Sequence[FileLayout], folder: Path
) -> Iterator[tuple[Unit, Filled | None]]:
    """Copy `units` of `earlier` into the reserved `files` of `folder`; each is yielded when its bytes are copied, read
    back and hashed: with None if they differ from those that the earlier work made.

    A file that stays the same is copied as one range, which begins at a page: a file system with shared blocks (XFS,
    Btrfs) then shares them and copies nothing.
    """
    reused = {unit.tensor_name(suffix) for unit in units for suffix in unit.places}
    whole = {file.name for file in files if _same_file(earlier, file, reused)}
    order = {file.name: index for index, file in enumerate(files)}
    ending: dict[int, list[Unit]] = {}
    for unit in units:
        # a unit can be read back only after the last file that has a part of it
        ending.setdefault(max(order[place.file] for place in unit.places.values()), []).append(unit)
    for index, file in enumerate(files):
        if file.name in whole:
            start = len(file.header)
            _copy(earlier.folder / file.name, start, folder / file.name, start, file.nbytes - start)
        for unit in ending.get(index, []):
            _copy_places(earlier, unit, whole, folder)
        for unit, filled in digests_on_disk(ending.get(index, []), folder):
            yield unit, filled if filled == earlier.filled(unit) else None


def _copy_places(earlier: Earlier, unit: Unit, whole: set[str], folder: Path) -> None:
    for suffix, place in unit.places.items():
        if place.file not in whole:
            old = earlier.place(unit, suffix)
            assert old is not None, unit.name
            parts = zip(old.ranges(0, old.nbytes), place.ranges(0, place.nbytes), strict=True)
            for (start, length), (offset, _) in parts:
                _copy(earlier.folder / old.file, start, folder / place.file, offset, length)


def _same_file(earlier: Earlier, file: FileLayout, reused: set[str]) -> bool:
    same = earlier.manifest.weights.get(file.name) == hash_bytes(file.header)
    return same and all(part.name in reused for tensor in file.tensors for part in tensor.parts)


def _copy(earlier: Path, start: int, target: Path, offset: int, length: int) -> None:
    """Let the system copy `length` bytes from `start` of one file to `offset` of another, sharing blocks if it can."""
    try:
        with earlier.open("rb", buffering=0) as old, target.open("r+b", buffering=0) as new:
            _copy_range(old.fileno(), start, new.fileno(), offset, length)
    except OSError as error:
        raise stopped(error, target, f"cannot be copied from {earlier}") from None


def _copy_range(old: int, start: int, new: int, offset: int, length: int) -> None:
    done = 0
    while done < length:
        try:
            count = os.copy_file_range(old, new, length - done, start + done, offset + done)
        except (OSError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno not in NOT_HERE:
                raise
            data = os.pread(old, min(COPY_BLOCK, length - done), start + done)
            count = os.pwrite(new, data, offset + done)
        if not count:
            raise OSError(errno.EIO, "the earlier file ends too early")
        done += count
