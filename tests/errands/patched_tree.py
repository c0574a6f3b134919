"""A copy of the sources with a patch applied, and `python` that imports it."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from places import ROOT, SUPPORT
from safetensors.torch import save_file
from tiny import write_checkpoint

PATCHES = Path(__file__).parent
PROCESS = PATCHES / "patched_process.py"
EXAMPLE = ROOT / "examples" / "tiny_deepseek_v3"
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
SHAPE: dict[str, Any] = {
    "vocab_size": 2048, "num_hidden_layers": 3, "n_routed_experts": 2, "n_group": 1, "topk_group": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "v_head_dim": 32,
}  # fmt: skip
"""Changes of tiny.CONFIG: the vocabulary of the example, one dense layer and two of experts."""
TIMEOUT = 900


def touched(patch: str) -> list[str]:
    """Files that a patch makes or changes, besides tests and documents."""
    files = re.findall(r"^diff --git a/\S+ b/(\S+)$", (PATCHES / patch).read_text(), re.M)
    return [file for file in files if not file.startswith(("tests/", "docs/"))]


def write_model(folder: Path, **changes: Any) -> Path:
    """A small random FP8 model with the example's tokenizer, and `calib.safetensors` beside it to calibrate it on."""
    write_checkpoint(folder, fp8=True, **(SHAPE | changes))
    for name in TEXT_FILES:
        shutil.copy(EXAMPLE / name, folder)
    ids = torch.randint(3, SHAPE["vocab_size"], (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder.with_name("calib.safetensors"))
    return folder


@dataclass(frozen=True)
class PatchedTree:
    """`folder` holds a copy of `fxquant/`, and `process` imports it."""

    folder: Path
    process: subprocess.Popen[str]

    def python(self, *arguments: object, code: int = 0) -> str:
        """What `python ARGUMENTS` prints, errors too, when it imports the copy; it must end with `code`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        files = [self.folder / "printed.txt", self.folder / "errors.txt"]
        print(json.dumps([*map(str, (*files, *arguments))]), file=self.process.stdin, flush=True)
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT)
        ended = self.process.stdout.readline() if ready else f"not in {TIMEOUT} seconds"
        printed, errors = (file.read_text(encoding="utf-8") for file in files)
        assert ended == f"{code}\n", f"{arguments}\n{printed}\n{errors}"
        return printed + errors

    def fxquant(self, *arguments: object, code: int = 0) -> str:
        """The same of a verb."""
        return self.python("-m", "fxquant", *arguments, code=code)


def copied(files: list[str], folder: Path) -> None:
    """Copy those files or folders of the project that are there."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
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


@contextmanager
def patched(patch: str, folder: Path, files: tuple[str, ...] = ("fxquant",)) -> Iterator[PatchedTree]:
    """Those `files` in `folder`, patched, until the end of its process."""
    copied([*files], folder)
    apply(patch, folder)
    environment = os.environ | {"PYTHONPATH": f"{folder}:{SUPPORT}", "COLUMNS": "300"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, str(PROCESS)], cwd=folder, env=environment, **pipes) as process:
        try:
            tree = PatchedTree(folder, process)
            where = tree.python("-c", "import fxquant; print(fxquant.__file__)").strip()
            assert Path(where).is_relative_to(folder)
            yield tree
        finally:
            process.kill()
