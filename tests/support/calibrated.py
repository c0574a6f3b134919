"""Calibrations for files whose tests compile a model for many targets: import the fixture `calibrated_once`."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import remembered

from fxquant.calibration.calibration_file import Calibration
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.passes import Calibrate
from fxquant.program.program import Program

LARGEST = 1 << 18
"""Numbers of a weight whose reference codes are remembered: all of the example's linears."""


@contextmanager
def earlier_taken() -> Iterator[None]:
    """What has calibrated the same files on the same text is taken, as `compile` takes that of an earlier output."""
    known: defaultdict[str, list[Calibration]] = defaultdict(list)
    original = Calibrate._calibrated

    def calibrated(calibrate: Calibrate, program: Program, inputs: dict[str, Any]) -> Calibration:
        earlier = known[repr(stamp_files(checkpoint_files(calibrate.source)))]
        calibrate.earlier = (*calibrate.earlier, *earlier)
        used = original(calibrate, program, inputs)
        if not any(calibration is used for calibration in earlier):
            earlier.append(used)
        return used

    with patch.object(Calibrate, "_calibrated", calibrated):
        yield


@pytest.fixture(scope="module", autouse=True)
def calibrated_once() -> Iterator[None]:
    """Calibrations, and reference codes of weights as large as the example's, are computed once in a file."""
    with earlier_taken(), patch.object(remembered, "LARGEST", LARGEST):
        yield
