"""What is installed: every module, whatever became of the links at the root, and nothing of an earlier build."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

pytest.importorskip("setuptools", minversion="77", reason="builds with it, as pip does in an environment of its own")

LINKS = ("passes", "lowering", "tools")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The sources, with a text file in place of each link, as an unpacked zip archive has it."""
    shutil.copytree(ROOT / "fxquant", tmp_path / "fxquant", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    for name in LINKS:
        (tmp_path / name).write_text(f"fxquant/{name}")
    return tmp_path


def build(checkout: Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_py"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_everything_is_installed_without_links(checkout: Path) -> None:
    done = build(checkout)
    assert done.returncode == 0, done.stderr
    expected = files(checkout / "fxquant")
    assert files(checkout / "build/lib/fxquant") == expected and len(expected) > 250


def test_modules_of_an_earlier_build_are_not_installed(checkout: Path) -> None:
    left = checkout / "build/lib/fxquant/passes/removed.py"
    left.parent.mkdir(parents=True)
    left.touch()
    assert build(checkout).returncode == 0
    assert not left.exists() and (left.parent / "quantize_linear.py").is_file()


def test_links_change_nothing(checkout: Path) -> None:
    for name in LINKS:
        (checkout / name).unlink()
        (checkout / name).symlink_to(f"fxquant/{name}")
    assert build(checkout).returncode == 0
    assert files(checkout / "build/lib/fxquant") == files(checkout / "fxquant")


def test_the_links_at_the_root_lead_to_the_packages() -> None:
    """In a checkout that can have links."""
    for name in LINKS:
        link = ROOT / name
        assert not link.is_symlink() or link.readlink() == Path("fxquant", name)


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their name alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
