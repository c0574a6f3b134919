"""The errand "add an engine" (docs/extending-engine.md): add_engine.patch does it, in three files, on a copy."""

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from patched_tree import PatchedTree, patched, write_model
from places import ROOT

PATCH = Path(__file__).with_name("add_engine.patch")
COPIED = ("fxquant", "tests", "pyproject.toml")
NAME = "example-engine"
POLICY = "deepseek_w4a8"
INFER = """
import sys
from pathlib import Path
from fxquant.program.program_file import load_program
from fxquant.verification.file_checks import infer_target
out = Path(sys.argv[1])
print(infer_target(load_program(out / "fxquant_graph.json"), out))
"""


def patched_files() -> list[PurePosixPath]:
    """Every file that the patch makes or changes."""
    return [PurePosixPath(name) for name in re.findall(r"^\+\+\+ b/(\S+)$", PATCH.read_text(), re.M)]


def test_three_files_besides_tests_and_documents() -> None:
    files = [file for file in patched_files() if file.parts[0] not in ("tests", "docs")]
    assert 0 < len(files) <= 3, files
    assert len(files) == PATCH.read_text().count("\ndiff --git ") + 1


def test_an_installation_has_them() -> None:
    """Packages are found, and the globs of pyproject.toml cover the rest."""
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["fxquant"]
    for file in patched_files():
        inside = file.relative_to("fxquant")
        deep = [glob for glob in package_data if glob.count("/") == len(inside.parts) - 1]
        assert file.suffix == ".py" or any(inside.match(glob) for glob in deep), file


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PatchedTree]:
    """A copy of the project that has the engine."""
    with patched(PATCH.name, tmp_path_factory.mktemp("project"), COPIED) as tree:
        yield tree


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With two groups of 256 in the wider rows."""
    return write_model(tmp_path_factory.mktemp("source") / "model", hidden_size=512)


@pytest.fixture(scope="module")
def compiled(tree: PatchedTree, model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """An output for the engine, and its report."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    return out, json.loads(compile_for(NAME, tree, model, out, "--json", "--quiet"))


def compile_for(target: str, tree: PatchedTree, model: Path, out: Path, *options: str) -> str:
    """What `fxquant compile` prints."""
    calib = model.with_name("calib.safetensors")
    return tree.fxquant(
        "compile", model, "-p", POLICY, "--target", target, "-o", out, "--calib", calib, "--no-export", *options
    )


@pytest.mark.slow
def test_compile_writes_the_engines_files_and_verifies_them(compiled: tuple[Path, dict]) -> None:
    out, report = compiled
    assert report["target"] == NAME and report["serve"] == f"example-server --model {out}"
    assert report["verification"]["verdict"] == "verified"
    names = [check["check"] for check in report["verification"]["checks"]]
    assert f"{NAME}: weights == graph" in names and f"contract of {NAME}, ranks: 1" in names
    assert (out / "example_model.safetensors").is_file()
    header = json.loads((out / "example_description.json").read_text())
    assert header["version"] == "1.0.0" and header["group_size"] == 256


@pytest.mark.slow
def test_verify_reads_an_output_and_knows_it_without_a_manifest(
    tree: PatchedTree, model: Path, compiled: tuple[Path, dict]
) -> None:
    out, _ = compiled
    printed = tree.fxquant("verify", out, "--against", model)
    assert f"{NAME}: weights == graph" in printed and "FAILED" not in printed
    assert tree.python("-c", INFER, out).strip() == NAME


@pytest.mark.slow
def test_convert_from_another_engine_gives_the_same_weights(
    tree: PatchedTree, model: Path, compiled: tuple[Path, dict], tmp_path: Path
) -> None:
    other, into = tmp_path / "ascend", tmp_path / "converted"
    compile_for("ascend", tree, model, other, "--no-verify")
    tree.fxquant("convert", other, "--target", NAME, "-o", into, "--no-export")
    for name in ("example_model.safetensors", "example_description.json", "config.json"):
        assert (into / name).read_bytes() == (compiled[0] / name).read_bytes(), name


@pytest.mark.slow
def test_help_contracts_and_refusals_name_it(tree: PatchedTree, model: Path) -> None:
    for verb in ("compile", "plan"):
        words = " ".join(re.sub(r"[│\s]+", " ", tree.fxquant(verb, "--help")).split())
        assert f"onnx or {NAME}: see fxquant targets." in words
    printed = tree.fxquant("targets", "--target", NAME)
    assert "ExampleEngine 1.0" in printed and "example-server --model OUT" in printed
    options = ("--table", "-p", "deepseek_w8a8_mix", "-t", NAME, "--tp", "1")
    refused = " ".join(tree.fxquant("targets", model, *options, code=1).split())
    assert "a linear has one kind of activation (example-engine linear.py)" in refused


@pytest.mark.slow
def test_what_holds_of_every_engine_holds_of_it(tree: PatchedTree) -> None:
    """The table, and that nothing outside of the packages names an engine."""
    printed = tree.python(
        "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "tests/engines/test_engine_table.py"
    )
    assert " passed" in printed
