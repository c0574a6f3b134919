"""Commands that are given a path of the wrong sort: the error says what it is and what would be right."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import Fxquant
from rewrites import float_program

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.generation.completion import Piece
from fxquant.generation.prompts import Encoded

COMPILED = (("verify",), ("run", "--prompt", "x"), ("bench",), ("eval", "--text", "x"), ("convert", "-t", "mindie"))
MODELS = (("compile",), ("plan",), ("show",), ("compare", "--text", "x"))


@pytest.fixture
def places(tmp_path: Path, tiny_folder: Callable[..., Path]) -> dict[str, Path]:
    """Paths of every kind."""
    folders = {name: tmp_path / name for name in ("empty", "out.partial", "out")}
    for folder in folders.values():
        folder.mkdir()
    (folders["out"] / "fxquant_manifest.json").write_text("{}")
    (tmp_path / "link").symlink_to("gone")
    inputs = {"missing": tmp_path / "ou", "link": tmp_path / "link", "model": tiny_folder()}
    return (
        folders | inputs | {"file": tiny_folder() / "config.json", "inside": folders["out"] / "fxquant_manifest.json"}
    )


@pytest.mark.parametrize("verb", COMPILED, ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    "kind, words",
    [
        ("missing", ["no such folder.", "Pass a compiled folder. Similar names there: out"]),
        ("link", ["a link to gone, which does not exist."]),
        ("file", ["a file, not a folder."]),
        ("inside", ["a file, not a folder.", "Pass its folder: {parent}"]),
        ("model", ["a model, not an output of fxquant", "Compile it first: fxquant compile {path}"]),
        ("empty", ["not an output of fxquant: it is empty."]),
        ("out.partial", ["unfinished work, not an output", "Run its command again to finish it."]),
    ],
)
def test_no_compiled_folder(
    fxquant_: Fxquant, places: dict[str, Path], verb: tuple[str, ...], kind: str, words: list[str]
) -> None:
    path = places[kind]
    code, out, text = fxquant_(verb[0], path, *verb[1:])
    assert code == 1 and out == "" and str(path) in text.splitlines()
    told = [word.format(path=path, parent=path.parent) for word in words]
    assert [word for word in told if word not in " ".join(text.split())] == [], text


@pytest.mark.parametrize("verb", MODELS, ids=lambda verb: verb[0])
@pytest.mark.parametrize(
    "kind, words",
    [
        (
            "missing",
            [
                "no such file or folder.",
                "Pass a Hugging Face checkpoint folder or a model.py. Similar names there: out",
            ],
        ),
        ("link", ["a link to gone, which does not exist."]),
        ("out", ["a compiled folder, not a model."]),
        ("empty", ["config.json"]),
    ],
)
def test_no_model(
    fxquant_: Fxquant, places: dict[str, Path], verb: tuple[str, ...], kind: str, words: list[str]
) -> None:
    code, out, text = fxquant_(verb[0], places[kind], *verb[1:])
    assert code == 1 and out == "" and [word for word in words if word not in text] == [], text


@pytest.mark.parametrize(
    "verb", [command for command in MODELS if command[0] not in ("plan", "show")], ids=lambda verb: verb[0]
)
def test_a_file_of_a_model(fxquant_: Fxquant, places: dict[str, Path], verb: tuple[str, ...]) -> None:
    code, _, text = fxquant_(verb[0], places["file"], *verb[1:])
    assert code == 1 and f"→ Pass its folder: {places['model']}" in text


@pytest.mark.parametrize("text", ["missing", "empty"])
def test_no_text(fxquant_: Fxquant, places: dict[str, Path], text: str) -> None:
    code, out, told = fxquant_("compare", places["model"], "--text", places[text])
    assert code == 1 and out == ""
    assert ("no such file." if text == "missing" else "not a regular file") in told


def test_a_block_that_is_not_there(fxquant_: Fxquant, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    program = float_program(checkpoint)
    monkeypatch.setattr("fxquant.api.open_graph", lambda *arguments: program)
    code, out, text = fxquant_("show", "model", "--block", "model.layer.1")
    assert code == 1 and out == "" and "--block model.layer.1" in text
    assert "before … after" in text and "→ Similar: model.layers.1" in text
    code, out, text = fxquant_("show", "model", "--block", "model.layers.1")
    assert code == 0 and out.startswith("── model.layers.1 ") and text == ""


def test_a_prompt_is_printed_after_the_folder_was_looked_at(
    fxquant_: Fxquant, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fxquant_("run", places["empty"], "--prompt", "def main(")[1] == ""
    written = SimpleNamespace(
        notes=[],
        runner=None,
        encode=lambda prompts, report: [Encoded("--prompt", "def main(", [1])],
        write=lambda prompts, report: iter([Piece(0, "):\n"), Piece(0, "\t\x1b[2J")]),
    )
    monkeypatch.setattr("fxquant.api.open_generator", lambda *arguments: written)
    assert fxquant_("run", "out", "--prompt", "def main(") == (0, "def main():\n\t\\x1b[2J\n", "")
