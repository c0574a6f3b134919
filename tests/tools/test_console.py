"""What is printed: text from outside does nothing to a terminal, names and commands are whole, in any encoding."""

import io
import json
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.text import Text

from fxquant.errors import FxquantError
from fxquant.tools import console as consoles
from fxquant.tools.console import LOG_WIDTH, Terminal, print_json, print_line, print_whole, prose, show_error, size
from fxquant.tools.stages import Lines, _bar, _line, duration
from fxquant.tools.tables import NamedTable

HOSTILE = "a\x1b[31m\x07\x9b\x7f\u202eb\u2066\ud800\r[bold]x[/] :smile: {task}"
SHOWN = r"a\x1b[31m\x07\x9b\x7f\u202eb\u2066\ud800\x0d[bold]x[/] :smile: {task}"


class Stream(io.TextIOWrapper):
    """A stream of some encoding, that keeps what was written."""

    def __init__(self, encoding: str) -> None:
        super().__init__(io.BytesIO(), encoding, errors="backslashreplace", write_through=True)

    def written(self) -> str:
        return self.buffer.getvalue().decode(self.encoding)  # type: ignore[attr-defined]


def terminal(width: int = 80, encoding: str = "utf-8") -> Terminal:
    return Terminal(width=width, file=Stream(encoding))


def hostile_table(cell: str) -> NamedTable:
    table = NamedTable((cell, "red"), ("name", "value", "why"), prose=("why",), caption=cell)
    table.add_row(cell, cell, (cell, "green"))
    return table


PRINTED: dict[str, Callable[[Terminal], None]] = {
    "string": lambda to: to.print(HOSTILE),
    "text": lambda to: to.print(Text(HOSTILE, "bold")),
    "soft": lambda to: to.print(HOSTILE, soft_wrap=True, end=""),
    "line": lambda to: print_line(HOSTILE, (HOSTILE, "red"), to=to),
    "whole": lambda to: print_whole(HOSTILE, to=to),
    "prose": lambda to: prose(HOSTILE, to),
    "error": lambda to: show_error(FxquantError(HOSTILE, HOSTILE, f"{HOSTILE}\n{HOSTILE}"), to),
    "table": lambda to: to.print(hostile_table(HOSTILE)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
@pytest.mark.parametrize("width", [20, 200])
@pytest.mark.parametrize("printed", PRINTED)
def test_text_from_outside_is_only_shown(printed: str, width: int, encoding: str) -> None:
    PRINTED[printed](to := terminal(width, encoding))
    text = to.file.written()
    shown = SHOWN.replace(r"\x07", "").replace(r"\x0d", "") if printed == "text" else SHOWN  # Text drops these itself
    assert (shown if width == 200 else shown.split("[bold]")[0]) in "".join(text.split(None if width == 20 else "\n"))
    unsafe = [character for character in text if character != "\n" and not character.isprintable()]
    assert unsafe == [], unsafe


def test_styles_are_the_only_control_characters() -> None:
    to = Terminal(width=200, file=Stream("utf-8"), force_terminal=True, color_system="standard")
    print_line(HOSTILE, ("red\x1b[0m", "red"), to=to)
    assert to.file.written() == SHOWN + "\x1b[31mred\\x1b[0m\x1b[0m\n"


def test_newlines_and_tabs_of_names_are_written_out() -> None:
    print_whole("fxquant\nverified\t✓", to=(to := terminal()))
    to.print(hostile_table("one\ntwo"))
    assert "fxquant\\nverified\\t✓\n" in to.file.written() and "one\\ntwo" in to.file.written()


def test_generated_text_keeps_its_lines() -> None:
    to = terminal()
    for piece in ("def main(", "):\n\treturn 1\n", "\x1b[2J"):
        to.print(piece, end="", soft_wrap=True)
    assert to.file.written().expandtabs() == "def main():\n        return 1\n\\x1b[2J"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_signs_of_ours_are_spelled(encoding: str) -> None:
    to = terminal(60, encoding)
    show_error(FxquantError("a → b", "‹x› × 2 …", "do ✓"), to)
    to.print(hostile_table("é → 日"))
    text = to.file.written()
    if encoding == "ascii":
        assert "a -> b" in text and "<x> x 2 ..." in text and "-> do +" in text and "| \\xe9 -> \\u65e5" in text
    elif encoding == "latin-1":
        assert "a -> b" in text and "é -> \\u65e5" in text and "┃" not in text
    else:
        assert "a → b" in text and "┃ name" in text and "é → 日" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_can_be_read_in_any_encoding(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    to = terminal(encoding=encoding)
    monkeypatch.setattr(consoles, "console", to)
    document = {"é → 日": HOSTILE, "none": None, "n": [1.5, "\t\n"]}
    print_json(document)
    text = to.file.written()
    assert json.loads(text) == document and not any(character in text for character in "\x1b\x7f\x9b\u202e\u2066")


# width


def long_error() -> FxquantError:
    place = "/models/" + "deep/" * 40 + "config.json"
    command = "fxquant compile " + "x" * 150 + " --policy deepseek_w4a8 -o 'a folder'"
    return FxquantError(
        place, "a fact of many words " * 9 + "model.layers.0." + "y" * 150, f"Quantize again:\n{command}"
    )


@pytest.mark.parametrize("width", [60, 80, 120, LOG_WIDTH])
def test_an_error_keeps_names_and_commands_whole(width: int) -> None:
    show_error(error := long_error(), to := terminal(width))
    lines = to.file.written().splitlines()
    command = error.remedy.split("\n")[1]
    assert error.place in lines and command in lines
    assert any("model.layers.0." + "y" * 150 in line for line in lines)
    prose_lines = [line for line in lines if "many words" in line]
    assert (max(map(len, prose_lines)) <= min(width, 100)) is (width < LOG_WIDTH)
    assert len(lines) <= 24


@pytest.mark.parametrize(
    "state, remedy, told",
    [
        ("/out is as it was. The same command starts again.", "Mend it.", True),
        ("Nothing was left at /out. The same command starts again.", "Mend it.", False),
        ("/out is as it was. It is kept: go on.", "Free space. It is kept: go on.", False),
    ],
)
def test_an_error_tells_what_the_output_is_now(state: str, remedy: str, told: bool) -> None:
    error = FxquantError("place", "fact.", remedy)
    error.state = state
    show_error(error, to := terminal())
    assert (state in to.file.written()) is told


def test_a_fact_without_end_is_one_screen() -> None:
    show_error(FxquantError("place", "word " * 10**5), to := terminal())
    assert len(to.file.written().splitlines()) <= 30


# progress


def test_stages_with_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (_bar, _line):
        monkeypatch.setattr("fxquant.tools.stages.errors", to := terminal(80))
        with stage("calibrate {task.x} [bold]\x1b[2J", 2_000_000, "bytes") as advance:
            advance(500_000)
            advance(1_500_000, at="here")
        assert "calibrate {task.x} [bold]\\x1b[2J" in to.file.written()
        assert stage is not _line or "2 MB" in to.file.written()


def test_a_long_stage_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    now = SimpleNamespace(time=100.0)
    monkeypatch.setattr("fxquant.tools.stages.time.monotonic", lambda: now.time)
    lines = Lines("deepseek_w4a8: quantize", 40_000_000, "bytes", to := terminal(200))
    for _ in range(5):
        now.time += 10.0
        lines(1_000_000, at="model.layers.3")
    assert to.file.written() == ("deepseek_w4a8: quantize, at model.layers.3: 3 MB of 40 MB, 100 kB/s, 6.2 min left\n")
    now.time += 40.0
    lines(35_000_000)
    assert to.file.written().count("\n") == 1, "the end of a stage is the start of the next"


def test_units() -> None:
    assert [size(nbytes) for nbytes in (0, 999, 1000, 13_400_000, 4 << 30, 10**13)] == [
        "0 B",
        "999 B",
        "1 kB",
        "13.4 MB",
        "4.29 GB",
        "10 TB",
    ]
    assert [duration(seconds) for seconds in (0.81, 42.4, 720)] == ["0.8 s", "42 s", "12.0 min"]
