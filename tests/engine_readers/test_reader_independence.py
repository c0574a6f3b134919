"""The readers know nothing of fxquant but its errors: what they agree on with the writer is in the bytes."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fxquant.engine_readers

FOLDER = Path(fxquant.engine_readers.__file__).parent
FILES = sorted(FOLDER.glob("*.py"))


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_imports_of_fxquant_are_its_errors_and_the_readers(file: Path) -> None:
    allowed = ("fxquant.errors.", "fxquant.engine_readers.")
    own = [name for name in imported(file) if name.split(".")[0] in ("fxquant", "lowering", "passes", "tools")]
    assert [name for name in own if not name.startswith(allowed)] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nothing_is_imported_by_name_at_run_time(file: Path) -> None:
    names = {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}
    assert not names & {"__import__", "importlib", "eval", "exec"}
    outside = {name.split(".")[0] for name in imported(file)} - {"fxquant"}
    assert outside <= {
        "collections",
        "dataclasses",
        "enum",
        "functools",
        "json",
        "pathlib",
        "safetensors",
        "torch",
        "typing",
    }
