"""What is installed: every module, whatever became of the links, and nothing of an earlier build."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="builds with it, as pip does in an environment of its own")

ROOT = Path(__file__).parents[1]
BESIDE = ("passes", "lowering", "tools")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources, with a text file in place of each link, as an unpacked zip archive has it."""
    for folder in ("fxquant", *BESIDE):
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    for name in BESIDE:
        (tmp_path / "fxquant" / name).unlink()
        (tmp_path / "fxquant" / name).write_text(f"../{name}")
    return tmp_path


def build(checkout: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_py"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def modules(folder: Path, name: str = "") -> dict[str, bytes]:
    return {f"{name}{file.relative_to(folder)}": file.read_bytes() for file in folder.rglob("*.py")}


def test_modules_are_installed_without_links(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    expected = modules(checkout / "fxquant")
    for name in BESIDE:
        expected |= modules(checkout / name, f"{name}/")
    assert modules(checkout / "build/lib/fxquant") == expected and len(expected) > 250


def test_modules_of_an_earlier_build_are_not_installed(checkout: Path) -> None:
    left = checkout / "build/lib/fxquant/passes/removed.py"
    left.parent.mkdir(parents=True)
    left.touch()
    assert build(checkout).returncode == 0
    assert not left.exists() and (left.parent / "smooth.py").is_file()


def test_links_change_nothing(checkout: Path) -> None:
    for name in BESIDE:
        (checkout / "fxquant" / name).unlink()
        (checkout / "fxquant" / name).symlink_to(f"../{name}")
    assert build(checkout).returncode == 0
    assert modules(checkout / "build/lib/fxquant/lowering") == modules(checkout / "lowering")


def test_an_incomplete_checkout_says_so(checkout: Path) -> None:
    shutil.rmtree(checkout / "lowering")
    done = build(checkout)
    assert done.returncode == 1 and not (checkout / "build").exists()
    assert done.stderr.strip() == (
        "lowering/ of the fxquant repository is missing: build from a complete checkout or archive."
    )
