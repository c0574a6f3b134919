"""Calibrations for files whose tests compile a model for many targets: import the fixture `calibrated_once`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp
from typing import Any
from unittest.mock import patch

import pytest
import remembered
from kept import Kept

from fxquant.calibration.calibration_file import CALIBRATION, Calibration, load_calibration
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.passes import Calibrate
from fxquant.program.program import Program
from fxquant.storage.hashing import hash_text

LARGEST = 1 << 18
"""Numbers of a weight whose reference codes are remembered: all of the example's linears."""


class Calibrations:
    """What has calibrated one model's files, in whichever process of the run: each in a folder of its own, as saved."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, Calibration] = {}

    def all(self) -> list[Calibration]:
        """Those that are there by now."""
        for path in sorted(self._folder.glob(f"*/{CALIBRATION}")):
            if path not in self._known:
                self._known[path] = load_calibration(path)
        return list(self._known.values())

    def add(self, calibration: Calibration) -> None:
        """One that none of them could replace."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = Path(mkdtemp(dir=self._folder)) / CALIBRATION
        calibration.save(path)
        self._known[path] = calibration


@contextmanager
def earlier_taken(kept: Kept) -> Iterator[None]:
    """What has calibrated the same files on the same text is taken, as `compile` takes that of an earlier output."""
    known: dict[str, Calibrations] = {}
    original = Calibrate._calibrated

    def calibrated(calibrate: Calibrate, program: Program, inputs: dict[str, Any]) -> Calibration:
        key = hash_text(repr(stamp_files(checkpoint_files(calibrate.source))))
        there = known.setdefault(key, Calibrations(kept.folder / "calibrations" / key))
        earlier = there.all()
        calibrate.earlier = (*calibrate.earlier, *earlier)
        used = original(calibrate, program, inputs)
        if not any(calibration is used for calibration in earlier):
            there.add(used)
        return used

    with patch.object(Calibrate, "_calibrated", calibrated):
        yield


@pytest.fixture(scope="module", autouse=True)
def calibrated_once(kept: Kept) -> Iterator[None]:
    """Calibrations are computed once in a run, reference codes of weights as large as the example's once in a file."""
    with earlier_taken(kept), patch.object(remembered, "LARGEST", LARGEST):
        yield
