"""Tables whose names are never cut, however narrow the screen."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from fxquant.tools.console import wrapped
from fxquant.tools.visible import one_line, spelled, visible

PROSE_WIDTH = 24
"""Minimum width of a column of sentences."""
Cell = str | tuple[str, str]
"""A text, or a text and its style."""


@dataclass
class NamedTable:
    """Rows of numbers and sentences; the first `names` columns say what a row is about.

    left, prose  headings of columns that are not right-aligned, and of those that hold sentences, which may be wrapped

    If it fits it is a table: as it is, with headings on several lines, with sentences wrapped, or with a few sentences
    below it. Else each row is its name on a separate line, with `heading value` pairs below.
    """

    title: Cell
    headings: Sequence[str]
    left: Collection[str] = ()
    prose: Collection[str] = ()
    names: int = 1
    caption: str = ""
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)
    sections: set[int] = field(default_factory=set)

    def add_row(self, *cells: Cell, style: str = "") -> None:
        """One cell per heading; missing ones are empty."""
        self.rows.append((*cells, *[""] * (len(self.headings) - len(cells))))
        self.styles.append(style)

    def add_section(self) -> None:
        """A line below the last row."""
        self.sections.add(len(self.rows) - 1)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = _Shown(self, console.encoding)
        width = options.max_width
        if _plain(self.title):
            yield from wrapped(shown.text(self.title, "italic"), width)
        ways = ((False, False), (True, False), (True, True))
        fitting = [shown.grid(*way) for way in ways if shown.width(*way) <= width]
        if fitting:
            yield fitting[0]
        elif shown.few_sentences() and shown.width(True, True, without=True) <= width:
            yield shown.grid(True, True, without=True)
            yield from shown.sentences(width)
        else:
            yield from shown.stacked(width)
        if self.caption:
            yield from wrapped(shown.text(self.caption, "dim italic"), width)


class _Shown:
    """The table in the characters that a console's encoding has."""

    def __init__(self, table: NamedTable, encoding: str) -> None:
        self._table, self._encoding = table, encoding
        self._rows = [[self._cell(index, cell) for index, cell in enumerate(row)] for row in table.rows]
        columns = range(len(table.headings))
        self._widths = [max((_width(row[index]) for row in self._rows), default=0) for index in columns]

    def text(self, cell: Cell, style: str = "") -> Text:
        return Text(spelled(visible(_plain(cell)), self._encoding), cell[1] if isinstance(cell, tuple) else style)

    def width(self, words: bool, prose: bool, without: bool = False) -> int:
        """Columns of the screen; `words`: headings on several lines, `prose`: sentences too, or `without` them."""
        return 1 + sum(3 + self._column(index, words, prose) for index in self._columns(without))

    def _columns(self, without: bool) -> list[int]:
        headings = self._table.headings
        return [index for index in range(len(headings)) if not (without and headings[index] in self._table.prose)]

    def few_sentences(self) -> bool:
        """Whether at most every second row has a sentence."""
        return 2 * sum(any(row[index].plain for index in self._prose()) for row in self._rows) <= len(self._rows)

    def _prose(self) -> list[int]:
        return [index for index, heading in enumerate(self._table.headings) if heading in self._table.prose]

    def sentences(self, width: int) -> Iterator[Text]:
        """`name: sentence`, one per line."""
        for row in self._rows:
            for index in self._prose():
                if row[index].plain:
                    name = Text("  ").join(cell for cell in row[: self._table.names] if cell.plain)
                    yield from _indented(Text.assemble((f"{name.plain}: ", "dim"), row[index]), width)

    def _column(self, index: int, words: bool, prose: bool) -> int:
        heading, width = self._table.headings[index], self._widths[index]
        if prose and heading in self._table.prose:
            width = min(width, max(PROSE_WIDTH, self._longest_word(index)))
        return max(width, *map(cell_len, heading.split(" ") if words else [heading]))

    def _longest_word(self, index: int) -> int:
        """Width of the longest word in a column of sentences: module names are long, and stay whole."""
        return max((cell_len(word) for row in self._rows for word in row[index].plain.split()), default=0)

    def grid(self, words: bool, prose: bool, without: bool = False) -> Table:
        """As rich draws it."""
        table, grid = self._table, Table()
        columns = self._columns(without)
        for index in columns:
            heading = table.headings[index]
            right = index >= table.names and heading not in table.left and heading not in table.prose
            wraps = prose and heading in table.prose
            width = self._column(index, words, prose)
            shown = Text("\n").join(wrapped(Text(heading), width))
            # min_width: rich would make a column narrower than the longest name in its sentences
            grid.add_column(
                shown, justify="right" if right else "left", no_wrap=not wraps, min_width=width, overflow="fold"
            )
        for number, (row, style) in enumerate(zip(self._rows, table.styles, strict=True)):
            grid.add_row(*(row[index] for index in columns), style=style or None, end_section=number in table.sections)
        return grid

    def stacked(self, width: int) -> Iterator[Text]:
        """Names with pairs below."""
        for row in self._rows:
            names = [cell for cell in row[: self._table.names] if cell.plain]
            if names:
                name = Text("  ").join(names)
                name.stylize("bold")
                yield _whole(name)
            yield from self._pairs(row, width)

    def _pairs(self, row: list[Text], width: int) -> Iterator[Text]:
        """`  heading value  heading value`: as many per line as fit, aligned in all rows."""
        line = Text()
        sentences = []
        for index in range(self._table.names, len(row)):
            heading, value = self._table.headings[index], row[index]
            if heading in self._table.prose:
                sentences += [(heading, value)] if value.plain else []
                continue
            pair = _pair(heading, value)
            pair.append(" " * (2 + len(heading) + 1 + self._widths[index] - cell_len(pair.plain)))
            if line and cell_len(line.plain) + cell_len(pair.plain) > width:
                yield _whole(line)
                line = Text()
            line.append_text(pair)
        if line.plain.strip():
            yield _whole(line)
        for heading, value in sentences:
            for number, part in enumerate(_pair(heading, value).split("\n")):
                yield from _indented(Text("    ").append_text(part) if number else part, width)

    def _cell(self, index: int, cell: Cell) -> Text:
        text = self.text(cell)
        return Text(one_line(text.plain), text.style) if index < self._table.names else text


def _plain(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell[0]


def _width(text: Text) -> int:
    return max((cell_len(line) for line in text.plain.split("\n")), default=0)


def _pair(heading: str, value: Text) -> Text:
    return Text.assemble("  ", (heading, "dim"), " " if heading else "", value) if value.plain else Text()


def _indented(text: Text, width: int) -> Iterator[Text]:
    for number, line in enumerate(wrapped(text, width - 4)):
        yield _whole(Text("    ").append_text(line) if number else line)


def _whole(line: Text) -> Text:
    """A line that rich does not break."""
    line.rstrip()
    line.no_wrap, line.overflow = True, "ignore"
    return line
