"""The walls between the rooms of `fxquant/` (CONTRIBUTING.md, "Style"), over the imports as they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from rooms import PACKAGE, ROOMS, Import, arrows, circles, imports, modules, room, tree, upward

ROOT = PACKAGE.parent
FACE = {"__init__", "__main__", "adapters", "api", "errors", "gc_pause", "progress", "version"}
GROUND = {"errors", "version", "gc_pause", "progress", "inputs"}
TORCH = {"torch", "onnx", "onnx_ir", "onnxruntime"}


@pytest.fixture(scope="module")
def imported() -> list[Import]:
    return imports()


def test_every_room_has_a_floor() -> None:
    assert {room(module) for module in modules()} == set(ROOMS)


def test_a_file_without_a_room_is_the_face() -> None:
    assert {name for name in ROOMS if not (PACKAGE / name).is_dir()} == FACE


def test_every_folder_is_a_package_that_says_what_is_in_it() -> None:
    folders = {file.parent for file in PACKAGE.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").is_file()] == []
    assert all(ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) for folder in folders)


def test_no_import_runs_up(imported: list[Import]) -> None:
    assert len(arrows(imported)) > 150
    assert [f"{arrow.importer} → {arrow.imported}" for arrow in upward(imported)] == []


def test_no_circle(imported: list[Import]) -> None:
    """Of modules, within a room too, whether imported for typing or late."""
    assert circles(imported) == []


def test_passes_and_files_are_apart(imported: list[Import]) -> None:
    assert not {("passes", "lowering"), ("passes", "verification")} & arrows(imported)


def test_readers_know_nothing_of_writers(imported: list[Import]) -> None:
    """Shared parts lie below; each engine's own reader is the one file of its package behind the wall."""
    assert {there for here, there in arrows(imported) if here == "engine_readers"} == {"errors"}
    own = [arrow for arrow in imported if arrow.importer.startswith("engines/") and arrow.importer.endswith("/reader")]
    assert len({arrow.importer for arrow in own}) >= 4
    assert {room(arrow.imported) for arrow in own} == {"errors", "engine_readers"}


def test_the_slow_reference_shares_no_arithmetic_with_kernels(imported: list[Import]) -> None:
    reference = [arrow for arrow in imported if arrow.importer.startswith("verification/reference")]
    assert (
        reference and {room(arrow.imported) for arrow in reference} & {"kernels", "transforms", "calibration"} == set()
    )


def test_nothing_imports_the_command_line(imported: list[Import]) -> None:
    assert {here for here, there in arrows(imported) if there == "tools"} == {"__main__"}


def test_code_that_is_pasted_imports_nothing_of_code_that_pastes(imported: list[Import]) -> None:
    pasted = [arrow.imported for arrow in imported if arrow.importer.startswith("lowering/ascend/emitted/")]
    assert [name for name in pasted if name.startswith(("lowering/ascend/emitter", "lowering/ascend/export"))] == []


def test_rooms_below_torch_import_without_it() -> None:
    """The ground, the names of engines, and what `plan` measures this machine with, in a process of its own."""
    names = ["processes.command", "kernels.int4", "kernels.search", "planning.host_benchmark", "engines.table"]
    names += sorted(GROUND)
    code = "; ".join(f"import fxquant.{name}" for name in names) + "; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert TORCH.isdisjoint(done.stdout.split())


def test_the_instrument_sees_an_import_up_and_a_circle(tmp_path: Path) -> None:
    for name, text in {
        "__init__": "",
        "errors": "def late():\n    from fxquant.policy import rule\n",
        "inputs/__init__": "import importlib\nimportlib.import_module('fxquant.policy.kinds')\n",
        "policy/__init__": "",
        "policy/rule": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fxquant.policy.kinds\n",
        "policy/kinds": "from fxquant.policy.rule import Rule\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    imported = imports(tmp_path)
    assert upward(imported) == [Import("errors", "policy/rule"), Import("inputs/__init__", "policy/kinds")]
    assert circles(imported) == [["policy/kinds", "policy/rule"]]


def test_the_tree_of_the_documents_is_that_of_the_package() -> None:
    """`python tests/repository/rooms.py` prints it."""
    assert tree() in (ROOT / "docs" / "architecture.md").read_text()
