"""The errand "add an engine" (docs/extending-engine.md): add_engine.patch does it, in three files, on a copy."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[2]
PATCH = Path(__file__).with_name("add_engine.patch")
COPIED = ("fxquant", "tests", "pyproject.toml")
EXAMPLE = ROOT / "examples" / "tiny_deepseek_v3"
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
TIMEOUT = 900

Command = Callable[..., subprocess.CompletedProcess]


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
def patched(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Runs `python` with its arguments on a copy of the project that has the engine."""
    copy = tmp_path_factory.mktemp("project")
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, copy / name)
    environment = {**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "200"}
    alone = {**environment, "GIT_CEILING_DIRECTORIES": str(copy.parent)}  # a folder of no repository
    subprocess.run(["git", "apply", str(PATCH)], cwd=copy, env=alone, check=True, timeout=TIMEOUT)

    def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
        command = [sys.executable, *map(str, arguments)]
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, check=False, timeout=TIMEOUT
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done

    where = run("-c", "import fxquant; print(fxquant.__file__)").stdout
    assert Path(where.strip()).is_relative_to(copy)
    return run


@pytest.fixture(scope="module")
def compiled(patched: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """An output for the engine, and its report."""
    out = tmp_path_factory.mktemp("compiled") / "out"
    options = ("-p", POLICY, "--target", NAME, "-o", out, "--no-export", "--json", "--quiet")
    return out, json.loads(patched("-m", "fxquant", "compile", EXAMPLE, *options).stdout)


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
def test_verify_reads_an_output_and_knows_it_without_a_manifest(patched: Command, compiled: tuple[Path, dict]) -> None:
    out, _ = compiled
    printed = patched("-m", "fxquant", "verify", out, "--against", EXAMPLE).stdout
    assert f"{NAME}: weights == graph" in printed and "FAILED" not in printed
    assert patched("-c", INFER, out).stdout.strip() == NAME


@pytest.mark.slow
def test_convert_from_another_engine_gives_the_same_weights(
    patched: Command, compiled: tuple[Path, dict], tmp_path: Path
) -> None:
    other, into = tmp_path / "ascend", tmp_path / "converted"
    options = ("-p", POLICY, "--target", "ascend", "-o", other, "--no-verify", "--no-export")
    patched("-m", "fxquant", "compile", EXAMPLE, *options)
    patched("-m", "fxquant", "convert", other, "--target", NAME, "-o", into, "--no-export")
    for name in ("example_model.safetensors", "example_description.json", "config.json"):
        assert (into / name).read_bytes() == (compiled[0] / name).read_bytes(), name


@pytest.mark.slow
def test_help_contracts_and_refusals_name_it(patched: Command) -> None:
    for verb in ("compile", "plan"):
        words = " ".join(re.sub(r"[│\s]+", " ", patched("-m", "fxquant", verb, "--help").stdout).split())
        assert f"onnx or {NAME}: see fxquant targets." in words
    printed = patched("-m", "fxquant", "targets", "--target", NAME).stdout
    assert "ExampleEngine 1.0" in printed and "example-server --model OUT" in printed
    options = ("--table", "-p", "deepseek_w8a8_mix", "-t", NAME, "--tp", "1")
    refused = " ".join(patched("-m", "fxquant", "targets", EXAMPLE, *options, code=1).stdout.split())
    assert "a linear has one kind of activation (example-engine linear.py)" in refused


@pytest.mark.slow
def test_what_holds_of_every_engine_holds_of_it(patched: Command) -> None:
    """The table, and that nothing outside of the packages names an engine."""
    printed = patched(
        "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", "tests/engines/test_engine_table.py"
    )
    assert " passed" in printed.stdout
