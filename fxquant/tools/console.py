"""Console output: consoles that print text from outside as plain text, and errors on one screen."""

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
    """A console on which text from outside has no side effects, and nothing is cut.

    There is no markup, so brackets are brackets; styled text is a `Text`. Control characters are escaped. Lines are
    wrapped between words, and a word that is too long for a line stays whole.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape before the layout, which needs the width of escapes."""
        return super().render_str(self._shown(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Escape text of any renderable."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(self._shown(segment.text), segment.style)

    def print(self, *objects: Any, **options: Any) -> None:
        """Wrap lines of text at `width`, or at the terminal's width."""
        width = options.pop("width", None) or self.width
        if not options.get("soft_wrap"):
            objects = tuple(self._wrapped(item, width) if isinstance(item, str | Text) else item for item in objects)
        super().print(*objects, **{"overflow": "ignore", "crop": False, **options})

    def on_broken_pipe(self) -> None:
        """Raise for the boundary; rich would end the process here."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def _wrapped(self, text: str | Text, width: int) -> Text:
        text = Text(self._shown(text)) if isinstance(text, str) else text
        return Text("\n").join(
            line for paragraph in text.split("\n", allow_blank=True) for line in wrapped(paragraph, width)
        )

    def _shown(self, text: str) -> str:
        return spelled(visible(text), self.encoding)


def wrapped(line: Text, width: int) -> list[Text]:
    """Lines of whole words, each at most `width` wide unless one word is wider."""
    breaks, used = [], 0
    for word in re.finditer(r"\s*\S+", line.plain):
        bare = word[0].lstrip()
        if used and used + cell_len(word[0]) > width:
            breaks.append(word.end() - len(bare))
            used = cell_len(bare)
        else:
            used += cell_len(word[0])
    lines = line.divide(breaks)
    for part in lines[:-1]:
        part.rstrip()
    return list(lines)


def _terminal(stderr: bool) -> Terminal:
    plain = Terminal(stderr=stderr)
    return plain if plain.is_terminal or "COLUMNS" in os.environ else Terminal(stderr=stderr, width=LOG_WIDTH)


console, errors = _terminal(stderr=False), _terminal(stderr=True)


def print_line(*parts: str | tuple[str, str], to: Console = console) -> None:
    """Print texts, each alone or with its style, as one line, wrapped between words."""
    to.print(
        Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))
    )


def print_notes(notes: Iterable[str], to: Console = console) -> None:
    """Print what nobody asked for, a line each."""
    for note in notes:
        print_line((note, "yellow"), to=to)


def print_whole(text: str, style: str = "", to: Console = console) -> None:
    """Print one line to copy: its only newline is at the end."""
    to.print(Text(one_line(text), style), soft_wrap=True)


def print_text(text: str, to: Console = console) -> None:
    """Print lines as they are, unwrapped."""
    to.print(Text(visible(text)), soft_wrap=True)


def print_json(document: Any) -> None:
    """Print only the document on stdout, in ASCII unless stdout's encoding is UTF."""
    _write_json(document, indent=2)


def print_json_line(document: Any) -> None:
    """The same on one line, at once."""
    _write_json(document, indent=None)
    console.file.flush()


def _write_json(document: Any, indent: int | None) -> None:
    text = json.dumps(document, indent=indent, ensure_ascii=not console.encoding.startswith("utf"))
    # json leaves C1 controls and direction overrides as they are
    console.file.write(UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")


def print_piece(text: str) -> None:
    """Print a part of a text at once: tabs and newlines as they are, no newline after it."""
    console.file.write(spelled(visible(text), console.encoding))
    console.file.flush()


def show_error(error: FxquantError, to: Console = errors) -> None:
    """Show place, fact and remedy on one screen, and the state of the output if anything is left there."""
    state = "" if error.state.startswith("Nothing was left") else error.state
    # the remedy may end with the same advice
    told = state.rpartition(". ")[2] in error.remedy
    screen("error", error.place, error.fact + (f"\n\n{state}" if state and not told else ""), error.remedy, to)


def screen(title: str, place: str, fact: str, remedy: str = "", to: Console = errors) -> None:
    """Print between two rules. The lines of `remedy` after its first are commands, each a line to copy."""
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
    """Print wrapped between words on a terminal, at most `SCREEN_WIDTH` wide; unwrapped in a log."""
    to.print(Text(visible(text)), width=to.width if to.width == LOG_WIDTH else min(to.width, SCREEN_WIDTH))


def size(nbytes: int) -> str:
    """Human-readable bytes: 13.5 MB."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}" if unit != "B" else f"{nbytes} B"
        value /= 1000
    return f"{value:.3g} TB"


def exit_quietly_on_stdout() -> None:
    """Discard what stdout still buffers: it cannot be written, and flushing it at exit would raise."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError, AttributeError):  # stdout is not a file
        return
