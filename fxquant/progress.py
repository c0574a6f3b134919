"""How long work says how far it is, without knowing who listens."""

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Advance(Protocol):
    """Called with the amount of work just done."""

    def __call__(self, amount: int) -> None: ...


class Reporter(Protocol):
    """Opens one bar a stage; `unit` is "bytes", "nodes" or the like."""

    def __call__(self, stage: str, total: int, unit: str) -> AbstractContextManager[Advance]: ...


def silent(stage: str, total: int, unit: str) -> AbstractContextManager[Advance]:
    """The reporter of library calls: nothing."""
    return nullcontext(lambda amount: None)
