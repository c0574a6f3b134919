"""What is known of an engine lies in its package: nothing elsewhere names it, or its files."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxquant
from fxquant.engines.contract import load_contract
from fxquant.engines.serving import Serving
from fxquant.engines.table import DEFAULT, ENGINES, Target, description_stems, onnx_targets, weight_stems
from fxquant.tools.compile_options import parse_target
from fxquant.tools.main import app

PACKAGE = Path(fxquant.__file__).parent
ENGINE_FILES = PACKAGE / "engines"
NAMED = re.compile(rf"(?<![\w./-])({'|'.join(Target)})(?![\w./-])")
"""The name of an engine as a word of its own: no part of a path, a file's name or a longer name."""
SAYS = [*weight_stems(), *description_stems(), "quant_model"]


def strings(tree: ast.Module) -> Iterator[str]:
    """Every string constant that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    bodies = [node.body for node in ast.walk(tree) if isinstance(node, documented)]
    bare = [line for body in bodies for line in body if isinstance(line, ast.Expr)]
    words = {id(line.value) for line in bare if isinstance(line.value, ast.Constant)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in words:
            yield node.value


def engine_words(tree: ast.Module) -> list[str]:
    """Strings that say an engine's name or the names of its files, and members of `Target` by name."""
    members = [
        f"Target.{node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "Target"
    ]
    texts = [text for text in strings(tree) if NAMED.search(text) or any(word in text for word in SAYS)]
    return texts + [name for name in members if name.removeprefix("Target.") in Target.__members__]


@pytest.mark.parametrize("room", sorted(path.name for path in PACKAGE.iterdir() if path.suffix in ("", ".py")))
def test_no_file_elsewhere_knows_an_engine(room: str) -> None:
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    told = {file: engine_words(ast.parse(file.read_text())) for file in files if ENGINE_FILES not in file.parents}
    assert {str(file.relative_to(PACKAGE)): words for file, words in told.items() if words} == {}


def test_the_instrument_sees_names_files_and_members() -> None:
    source = '"""For mindie."""\nx = f"use mindie{x}", "quant_model_weights-1", Target.ONNX, Target(x), "model.onnx"\n'
    assert sorted(engine_words(ast.parse(source))) == ["Target.ONNX", "quant_model_weights-1", "use mindie"]
    own = [engine_words(ast.parse(file.read_text())) for file in sorted(ENGINE_FILES.rglob("*.py"))]
    assert sum(map(bool, own)) > len(Target)


def test_every_target_is_in_the_table_with_a_package_of_its_name() -> None:
    packages = {path.parent.name for path in ENGINE_FILES.glob("*/__init__.py")}
    assert list(ENGINES) == list(Target) and packages == {target.package for target in Target}
    assert DEFAULT in ENGINES and onnx_targets() == [Target.ONNX]
    assert all(load_contract(target).target is target for target in Target)


@pytest.mark.parametrize("target", list(Target))
def test_serving_words_name_the_folder(target: Target) -> None:
    line = ENGINES[target].serve(Serving("/outputs/of/mine"))
    assert "/outputs/of/mine" in line and "\n" not in line


@pytest.mark.parametrize("verb", ["compile", "plan"])
def test_help_names_every_target(verb: str) -> None:
    text = " ".join(CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output.split())
    *others, last = Target
    assert f"{', '.join(others)} or {last}: see fxquant targets." in text
    assert all(parse_target(target.value) is target for target in Target)
