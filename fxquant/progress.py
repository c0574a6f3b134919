"""How long work says how far it is, without knowing who listens."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Called with the amount of work just done, and with what is worked `at` where that says more than the stage."""

    def __call__(self, amount: int, at: str = "") -> None: ...


class Reporter(Protocol):
    """Opens one bar a stage; `unit` is "bytes", "nodes" or the like."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """The reporter of library calls: nothing."""
    return nullcontext(lambda amount, at="": None)


def within(name: str, report: Reporter) -> Reporter:
    """`report`, with `name` before each stage: what of many it is about."""
    return lambda stage, total, unit: report(f"{name}: {stage}", total, unit)
