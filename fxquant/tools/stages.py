"""Progress: bars on a terminal, lines in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from fxquant.progress import Advance, Reporter, silent
from fxquant.tools.console import console, errors, print_line, size
from fxquant.tools.visible import one_line

EVERY = 30.0
"""Seconds between two lines of one stage in a log."""
STAGE_WIDTH = 16
"""Columns for the name of a stage beside its bar; a longer one has a line of its own."""


def reporter(quiet: bool, beside_text: bool = False) -> Reporter:
    """Bars with rate and time left on a terminal; lines in a log, repeated while a stage lasts; nothing when quiet.

    `beside_text`: results are printed while a stage lasts, which a bar on the same terminal would overwrite.
    """
    if quiet:
        return silent
    return _bar if errors.is_terminal and not (beside_text and console.is_terminal) else _line


@contextmanager
def _bar(stage: str, total: int, unit: str) -> Iterator[Advance]:
    if len(stage) > STAGE_WIDTH:
        print_line((stage, "dim"), to=errors)
        stage = ""
    columns = (_Stage(stage), BarColumn(20), _Amount(unit), _Rate(unit), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda done, at="": progress.advance(task, done)


class _Stage(ProgressColumn):
    def __init__(self, stage: str) -> None:
        super().__init__()
        self._text = Text(one_line(stage).ljust(STAGE_WIDTH))

    def render(self, task: Task) -> Text:
        return self._text


class _Amount(ProgressColumn):
    """12.3 MB of 45.6 MB"""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        done, total = int(task.completed), int(task.total or 0)
        return Text(f"{_count(done, self._unit)} of {amount(total, self._unit)}")


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{rate(task.speed, self._unit)}" if task.speed else "")


def amount(number: int, unit: str) -> str:
    """`45.6 MB`, `1,200 nodes`"""
    return size(number) if unit == "bytes" else f"{number:,} {unit}"


def rate(speed: float, unit: str) -> str:
    """The same per second."""
    return f"{size(int(speed))}/s" if unit == "bytes" else f"{speed:.3g} {unit}/s"


def duration(seconds: float) -> str:
    """0.8 s, 42 s, 12 min"""
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def _count(number: int, unit: str) -> str:
    return size(number) if unit == "bytes" else f"{number:,}"


@contextmanager
def _line(stage: str, total: int, unit: str) -> Iterator[Advance]:
    print_line(f"{stage}: {amount(total, unit)}", to=errors)
    yield Lines(stage, total, unit)


class Lines:
    """`stage, at model.layers.3: 4.5 MB of 13.4 MB, 1.2 MB/s, 7.4 s left`, every 30 seconds."""

    def __init__(self, stage: str, total: int, unit: str, to: Console = errors) -> None:
        self._stage, self._total, self._unit, self._to = stage, total, unit, to
        self._done, self._began = 0, time.monotonic()
        self._told = self._began

    def __call__(self, amount: int, at: str = "") -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._told < EVERY or self._done >= self._total:
            return
        self._told = now
        print_line(self._text(now - self._began, at), to=self._to)

    def _text(self, seconds: float, at: str) -> str:
        speed = self._done / seconds
        left = f", {duration((self._total - self._done) / speed)} left" if speed else ""
        place = f", at {one_line(at)}" if at else ""
        done = f"{_count(self._done, self._unit)} of {amount(self._total, self._unit)}"
        return f"{one_line(self._stage)}{place}: {done}, {rate(speed, self._unit)}{left}"
