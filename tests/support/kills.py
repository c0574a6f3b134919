"""Ends of the work on weight files: after so many units."""

import pytest

from fxquant.lowering.weights import Unit
from fxquant.lowering.weights.fill import FillJob


class Killed(BaseException):
    """An end that no code can answer."""


def stop_after(count: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    """Let `count` units be filled, then raise; the names of all that were begun."""
    begun: list[str] = []
    original = FillJob.fill

    def fill(job: FillJob, unit: Unit) -> object:
        begun.append(unit.name)
        if len(begun) > count:
            raise error
        return original(job, unit)

    monkeypatch.setattr(FillJob, "fill", fill)
    return begun
