"""How long work says how far it is, without knowing who listens."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Call with the amount of work just done; `at` names the current item where that says more than the stage."""

    def __call__(self, amount: int, at: str = "") -> None: ...


class Reporter(Protocol):
    """Opens one progress bar per stage; `unit` is "bytes", "nodes" or similar."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """The default reporter of library calls: prints nothing."""
    return nullcontext(lambda amount, at="": None)


def within(name: str, report: Reporter) -> Reporter:
    """`report` with `name` prefixed to each stage, to tell several jobs apart."""
    return lambda stage, total, unit: report(f"{name}: {stage}", total, unit)
