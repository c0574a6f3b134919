"""Kernels in threads, in a second process, and without torch."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernel_loops import recipe_of, same_tensors
from kernel_reference import reference_tensors
from places import ROOT

from fxquant.kernels.module_tensors import ModuleMaker
from fxquant.kernels.source_rows import rows_of
from fxquant.schemes.schemes import Scheme

SMALL_PROCESS = """
import json, sys
import numpy as np
from fxquant.kernels.decode import EncodedRows
from fxquant.kernels.int4 import int4_rows
from fxquant.kernels.int8 import int8_rows
from fxquant.kernels.rounding import BFLOAT16, FLOAT32

def frozen(array):
    array.flags.writeable = False
    return array

raw = frozen(np.full((2, 64), 0x3F, np.uint8))
none = frozen(np.empty((0, 0), np.float32))
rows = EncodedRows(raw, BFLOAT16, 0, none, 128, 128, *[frozen(np.empty(0, np.float32))] * 2, BFLOAT16)
codes, scale = np.empty((2, 32), np.int8), np.empty(2, np.float32)
bad = int8_rows(rows, FLOAT32, codes, scale, np.empty(2, np.int64))
kernels, packed = [int8_rows], np.empty((1, 32), np.int8)
if "int4" in sys.argv:
    second, bias = np.empty((2, 1), np.float32), np.empty((2, 1), np.float32)
    bad = max(bad, int4_rows(rows, FLOAT32, packed, scale, second, bias))
    kernels.append(int4_rows)
print(json.dumps({
    "bad": bad,
    "codes": sorted(set(codes.flatten().tolist())),
    "packed": sorted(set(packed.flatten().tolist())) if "int4" in sys.argv else None,
    "torch": "torch" in sys.modules,
    "hits": [sum(kernel.stats.cache_hits.values()) for kernel in kernels],
    "misses": [sum(kernel.stats.cache_misses.values()) for kernel in kernels],
}))
"""


MADE = {"bad": -1, "codes": [127], "packed": None, "torch": False}
COMPILED, FOUND = {"hits": [0], "misses": [1]}, {"hits": [1], "misses": [0]}
BOTH = {"packed": [0x77]}
"""What the int4 kernel makes, where it is called too: it is compiled and kept like the other."""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with nothing but the kernels."""
    root = tmp_path / "root"
    shutil.copytree(ROOT / "fxquant/kernels", root / "fxquant/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("__init__.py", "version.py"):
        shutil.copy(ROOT / "fxquant" / name, root / "fxquant")
    return root


def start_small_process(root: Path, *kernels: str, **places: str) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"} | places
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_PROCESS, *kernels], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=root,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> dict:
    answer, said = process.communicate()
    assert process.returncode == 0 and said == ""
    return json.loads(answer)


def twice(counts: dict[str, list[int]]) -> dict[str, list[int]]:
    """Of two kernels, where both went the same way."""
    return {name: count * 2 for name, count in counts.items()}


def test_kernels_need_no_torch_and_are_compiled_once(package: Path, tmp_path: Path) -> None:
    cache, before = tmp_path / "cache", sorted(package.rglob("*"))
    assert finish(start_small_process(package, "int4", XDG_CACHE_HOME=str(cache))) == MADE | BOTH | twice(COMPILED)
    assert list(cache.glob("fxquant/kernels/*/*.code"))
    assert finish(start_small_process(package, "int4", XDG_CACHE_HOME=str(cache))) == MADE | BOTH | twice(FOUND)
    assert sorted(package.rglob("*")) == before


@pytest.mark.slow
def test_code_kept_from_another_version_is_not_taken(package: Path, tmp_path: Path) -> None:
    """Of the kernel's own file or of one that it calls into."""
    cache = str(tmp_path / "cache")
    assert finish(start_small_process(package, XDG_CACHE_HOME=cache))["codes"] == [127]
    file = package / "fxquant/kernels/rounding.py"
    file.write_text(file.read_text().replace("codes[j] = code", "codes[j] = code - 1"))
    changed = finish(start_small_process(package, XDG_CACHE_HOME=cache))
    assert (changed["codes"], changed["hits"]) == ([126], [0])


@pytest.mark.slow
def test_two_first_starts_at_once(package: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    processes = [start_small_process(package, XDG_CACHE_HOME=str(cache)) for _ in range(2)]
    assert [finish(process) for process in processes] == [MADE | COMPILED] * 2
    assert finish(start_small_process(package, XDG_CACHE_HOME=str(cache))) == MADE | FOUND
    assert not [file for file in cache.rglob("*") if file.is_file() and file.suffix not in (".code", ".txt")]


@pytest.mark.slow
def test_kernels_work_where_nothing_can_be_written(package: Path) -> None:
    places = {"HOME": "/proc/nowhere", "XDG_CACHE_HOME": "", "TMPDIR": "/proc"}
    assert finish(start_small_process(package, **places)) == MADE | COMPILED


def test_makers_in_threads_give_what_one_gives() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(64, 256, generator=generator).bfloat16() for _ in range(4)]
    recipes = [recipe_of(weights[0], Scheme.W4A8_DYNAMIC, 64), recipe_of(weights[0], Scheme.W8A8_DYNAMIC)]
    expected = [[reference_tensors(recipe, weight) for weight in weights] for recipe in recipes]

    def work(index: int) -> bool:
        maker = ModuleMaker(recipes[index % 2], "w")
        turns = [turn % 4 for turn in range(200)]
        return all(same_tensors(maker.rows(rows_of(weights[turn])), expected[index % 2][turn]) for turn in turns)

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(work, range(4))) == [True] * 4
