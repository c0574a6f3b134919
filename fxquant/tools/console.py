"""What all verbs share: consoles that print text from outside as text, and errors on one screen."""

import errno
import json
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from fxquant.errors import FxquantError
from fxquant.tools.visible import UNSAFE, one_line, spelled, visible

LOG_WIDTH = 100_000
"""Columns where there is no terminal: nothing is wrapped."""
SCREEN_WIDTH = 100
"""Columns of an error at most: prose of longer lines is hard to read."""
LONGEST_FACT = 1500


class Terminal(Console):
    """A console on which no text from outside does anything, and nothing is cut.

    There is no markup, so that brackets are brackets: what has a style is a `Text`. Control characters are written out.
    Lines are wrapped between words, and a word that is too long for a line stays whole.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Before the layout, so that what is written out has its place."""
        return super().render_str(self._shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Whatever the text came in."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._shown(segment.text), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Lines of text are wrapped at `width`, or where the terminal ends."""
        width = options.pop("width", None) or self.width
        if not options.get("soft_wrap"):
            objects = tuple(self._wrapped(one, width) if isinstance(one, str | Text) else one for one in objects)
        super().print(*objects, **{"overflow": "ignore", "crop": False, **options})

    def on_broken_pipe(self) -> None:
        """For the boundary to find, not an end of the process from here."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _wrapped(self, text: str | Text, width: int) -> Text:
        text = Text(self._shown(text)) if isinstance(text, str) else text
        return Text("\n").join(line for one in text.split("\n", allow_blank=True) for line in wrapped(one, width))

    def _shown(self, text: str) -> str:
        return spelled(visible(text), self.encoding)


def wrapped(line: Text, width: int) -> list[Text]:
    """Lines of whole words, each at most `width` wide where its words are."""
    breaks, used = [], 0
    for word in re.finditer(r"\s*\S+", line.plain):
        bare = word[0].lstrip()
        if used and used + cell_len(word[0]) > width:
            breaks.append(word.end() - len(bare))
            used = cell_len(bare)
        else:
            used += cell_len(word[0])
    lines = line.divide(breaks)
    for one in lines[:-1]:
        one.rstrip()
    return list(lines)


def _terminal(stderr: bool) -> Terminal:
    plain = Terminal(stderr=stderr)
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Terminal(stderr=stderr, width=LOG_WIDTH)


console, errors = _terminal(stderr=False), _terminal(stderr=True)


def print_line(*parts: str | tuple[str, str], to: Console = console) -> None:
    """Texts, each alone or with its style, as one line; it is wrapped between words."""
    to.print(Text.assemble(*(visible(one) if isinstance(one, str) else (visible(one[0]), one[1]) for one in parts)))


def print_whole(text: str, style: str = "", to: Console = console) -> None:
    """One line to copy: a newline stands only at its end."""
    to.print(Text(one_line(text), style), soft_wrap=True)


def print_text(text: str, to: Console = console) -> None:
    """Lines as they are."""
    to.print(Text(visible(text)), soft_wrap=True)


def print_json(document: Any) -> None:
    """The document alone on stdout, in ASCII where stdout has no more."""
    text = json.dumps(document, indent=2, ensure_ascii=not console.encoding.startswith("utf"))
    console.file.write(UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def show_error(error: FxquantError, to: Console = errors) -> None:
    """Place, fact and way out, on one screen, and what the output is now where that is more than nothing."""
    state = "" if error.state.startswith("Nothing was left") else error.state
    told = state.rpartition(". ")[2] in error.remedy
    screen("error", error.place, error.fact + (f"\n\n{state}" if state and not told else ""), error.remedy, to)


def screen(title: str, place: str, fact: str, remedy: str = "", to: Console = errors) -> None:
    """Between two rules. The lines of `remedy` after its first are commands, each a line to copy."""
    width = min(to.width, SCREEN_WIDTH)
    fact = fact if len(fact) <= LONGEST_FACT else fact[:LONGEST_FACT] + " …"
    print_line(("─ ", "red"), (title, "red bold"), (" " + "─" * (width - len(title) - 3), "red"), to=to)
    print_whole(place, "bold", to)
    to.print()
    prose(fact, to)
    if remedy:
        advice, *commands = remedy.split("\n")
        to.print()
        prose(f"→ {advice}", to)
        for command in commands:
            print_whole(command, to=to)
    print_line(("─" * width, "red"), to=to)


def prose(text: str, to: Console = errors) -> None:
    """Wrapped between words on a terminal, at most `SCREEN_WIDTH` wide; not at all in a log."""
    to.print(Text(visible(text)), width=to.width if to.width == LOG_WIDTH else min(to.width, SCREEN_WIDTH))


def size(nbytes: int) -> str:
    """Bytes for people: 13.5 MB."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1000
    return f"{value:.3g} TB"


def exit_quietly_on_stdout() -> None:
    """Nothing more can be written to stdout: what is still held back goes nowhere, without a word."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # no file behind it
        return
