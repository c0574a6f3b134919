"""The readers know nothing of fxquant but its errors: what they agree on with the writer is in the bytes."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from reader_folders import EXPERTS, Draft

import fxquant

PACKAGE = Path(fxquant.__file__).parent
READERS = sorted(PACKAGE.glob("engines/*/reader.py"))
FILES = [*sorted(PACKAGE.glob("engine_readers/*.py")), *READERS]
NAMES = [str(file.relative_to(PACKAGE).with_suffix("")) for file in FILES]
OWN = ("fxquant", "lowering", "passes", "tools")
ALONE = """
import json, sys, types
from importlib import import_module
from pathlib import Path

import fxquant

face = set(sys.modules)
engine, opener, folder, module, row_parallel = json.loads(sys.argv[1])
for name in ("fxquant.engines", f"fxquant.engines.{engine}"):  # packages whose own code is not run
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [str(Path(fxquant.__file__).parent.parent / name.replace(".", "/"))]
reader = getattr(import_module(f"fxquant.engines.{engine}.reader"), opener)(Path(folder), 1)
codes = reader.expert_linear(module, row_parallel).codes().tolist()
loaded = sorted(name for name in set(sys.modules) - face if name.split(".")[0] == "fxquant")
print(json.dumps([codes, loaded]))
"""
"""Loads one reader without the code of the packages it lies in, and reads a folder with it."""
OPENERS = {
    "ascend": ("open_vllm_ascend_per_group", 256),
    "mindie": ("open_mindie", 256),
    "mindie_2_1rc1": ("open_mindie_2_1rc1", 256),
    "sglang_npu": ("open_sglang_npu", 0),
    "vllm_ascend": ("open_vllm_ascend", 0),
}


def imported(file: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_imports_of_fxquant_are_its_errors_and_the_readers(file: Path) -> None:
    """Not another engine's reader either: each is held against its own engine."""
    allowed = ("fxquant.errors.", "fxquant.engine_readers.")
    own = [name for name in imported(file) if name.split(".")[0] in OWN]
    assert [name for name in own if not name.startswith(allowed)] == []


@pytest.mark.parametrize("file", FILES, ids=NAMES)
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


def test_every_reader_is_looked_at() -> None:
    assert [file.parent.name for file in READERS] == sorted(OPENERS)


@pytest.mark.parametrize("engine", sorted(OPENERS))
def test_a_reader_reads_without_any_code_of_the_writers(tmp_path: Path, engine: str) -> None:
    """Nothing but errors and readers is loaded: the packages that the module lies in are empty ones here."""
    opener, group = OPENERS[engine]
    draft, module = Draft(), f"{EXPERTS}.1.down_proj"
    draft.expert_layer(256, 256, group, packed=engine != "mindie_2_1rc1")
    draft.for_engine(engine.replace("_", "-", 1).replace("_", "."), group)
    argument = json.dumps([engine, opener, str(draft.write(tmp_path)), module, True])
    done = subprocess.run(
        [sys.executable, "-c", ALONE, argument], capture_output=True, text=True, check=False, cwd=PACKAGE.parent
    )
    assert done.returncode == 0, done.stderr
    codes, loaded = json.loads(done.stdout)
    assert codes == draft.truths[module].codes.tolist()
    reader = f"fxquant.engines.{engine}"
    assert f"{reader}.reader" in loaded
    others = set(loaded) - {"fxquant.errors", "fxquant.engines", reader, f"{reader}.reader"}
    assert others and all(name.split(".")[1] == "engine_readers" for name in others)
