"""What all verbs share: consoles, progress bars, errors on one screen."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from fxquant.errors import FxquantError
from fxquant.progress import Advance, Reporter, silent

WIDTH = 110
"""Columns where there is no terminal to ask."""


def _console(stderr: bool) -> Console:
    plain = Console(stderr=stderr)
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Console(stderr=stderr, width=WIDTH)


console, errors = _console(stderr=False), _console(stderr=True)
LONGEST_FACT = 1500


def reporter(quiet: bool) -> Reporter:
    """Bars with rate and time left on a terminal; one line a stage elsewhere; nothing when quiet."""
    if quiet:
        return silent
    return _bar if errors.is_terminal else _line


@contextmanager
def _bar(stage: str, total: int, unit: str) -> Iterator[Advance]:
    amount: list[ProgressColumn] = [MofNCompleteColumn(), TextColumn(unit), _Rate(unit)]
    if unit == "bytes":
        amount = [DownloadColumn(binary_units=True), TransferSpeedColumn()]
    columns = [TextColumn(f"{stage:16}"), BarColumn(), *amount, TimeElapsedColumn(), TimeRemainingColumn()]
    with Progress(*columns, console=errors) as progress:
        task = progress.add_task(stage, total=total)
        yield lambda done: progress.advance(task, done)


class _Rate(ProgressColumn):
    """What `TransferSpeedColumn` is for bytes."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> str:
        return f"{task.speed:.3g} {self._unit}/s" if task.speed else ""


@contextmanager
def _line(stage: str, total: int, unit: str) -> Iterator[Advance]:
    errors.print(f"{stage} ({total:,} {unit})", highlight=False)
    yield lambda done: None


def print_json(document: Any) -> None:
    """The document alone on stdout."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def show_error(error: FxquantError) -> None:
    """Place, fact and way out, on one screen."""
    fact = error.fact if len(error.fact) <= LONGEST_FACT else error.fact[:LONGEST_FACT] + " …"
    lines = [f"[bold]{escape(error.place)}[/]", "", escape(fact)]
    if error.remedy:
        lines += ["", f"[green]→[/] {escape(error.remedy)}"]
    errors.print(Panel("\n".join(lines), title="[red]error[/]", title_align="left", border_style="red"))


def size(nbytes: int) -> str:
    """Bytes for people: 13.5 MB."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1000
    return f"{value:.3g} TB"
