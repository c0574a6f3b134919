"""A copy of the sources with a patch applied, and `python` that imports it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATCHES = Path(__file__).parent
EXAMPLE = ROOT / "examples" / "tiny_deepseek_v3"
TIMEOUT = 900


def touched(patch: str) -> list[str]:
    """Files that a patch makes or changes, besides tests and documents."""
    files = re.findall(r"^diff --git a/\S+ b/(\S+)$", (PATCHES / patch).read_text(), re.M)
    return [file for file in files if not file.startswith(("tests/", "docs/"))]


@dataclass(frozen=True)
class PatchedTree:
    """`folder` holds a copy of `fxquant/`."""

    folder: Path

    def python(self, *arguments: object, code: int = 0) -> str:
        """What `python ARGUMENTS` prints, errors too, when it imports the copy; it must end with `code`."""
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(self.folder), "COLUMNS": "300"},
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT,
        )
        assert done.returncode == code, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def fxquant(self, *arguments: object, code: int = 0) -> str:
        """The same of a verb."""
        return self.python("-m", "fxquant", *arguments, code=code)


def copied(files: list[str], folder: Path) -> None:
    """Copy those files or folders of the project that are there."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder / name)


def apply(patch: str, folder: Path) -> None:
    """`git apply`, which needs no repository: none around `folder` is looked for."""
    alone = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    alone["GIT_CEILING_DIRECTORIES"] = str(folder.parent)
    done = subprocess.run(
        ["git", "apply", str(PATCHES / patch)], cwd=folder, env=alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def patched(patch: str, folder: Path) -> PatchedTree:
    """The whole package in `folder`, patched."""
    copied(["fxquant"], folder)
    apply(patch, folder)
    tree = PatchedTree(folder)
    where = tree.python("-c", "import fxquant; print(fxquant.__file__)").strip()
    assert Path(where).is_relative_to(folder)
    return tree
