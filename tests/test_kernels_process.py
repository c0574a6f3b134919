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

from fxquant.kernels.recipe import ModuleMaker
from fxquant.kernels.rounding import kernel
from fxquant.kernels.source_rows import rows_of
from fxquant.schemes import Scheme

ROOT = Path(__file__).parents[1]
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
packed, second, bias = np.empty((1, 32), np.int8), np.empty((2, 1), np.float32), np.empty((2, 1), np.float32)
bad = max(bad, int4_rows(rows, FLOAT32, packed, scale, second, bias))
kernels = (int8_rows, int4_rows)
print(json.dumps({
    "bad": bad,
    "codes": sorted(set(codes.flatten().tolist())),
    "packed": sorted(set(packed.flatten().tolist())),
    "torch": "torch" in sys.modules,
    "hits": [sum(kernel.stats.cache_hits.values()) for kernel in kernels],
    "misses": [sum(kernel.stats.cache_misses.values()) for kernel in kernels],
}))
"""


def small_process(cache: Path, root: Path = ROOT) -> dict:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-c", SMALL_PROCESS]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment, cwd=cache).stdout)


def test_kernels_need_no_torch_and_are_compiled_once(tmp_path: Path) -> None:
    made = {"bad": -1, "codes": [127], "packed": [0x77], "torch": False}
    assert small_process(tmp_path) == made | {"hits": [0, 0], "misses": [1, 1]}
    assert list(tmp_path.rglob("*.nbi"))
    assert small_process(tmp_path) == made | {"hits": [1, 1], "misses": [0, 0]}


@pytest.mark.slow
def test_code_kept_from_another_version_is_not_taken(tmp_path: Path) -> None:
    """Of the kernel's own file or of one that it calls into."""
    cache, root = tmp_path / "cache", tmp_path / "root"
    cache.mkdir()
    shutil.copytree(ROOT / "fxquant/kernels", root / "fxquant/kernels", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "fxquant/__init__.py", root / "fxquant")
    assert small_process(cache, root)["codes"] == [127]
    file = root / "fxquant/kernels/rounding.py"
    file.write_text(file.read_text().replace("codes[j] = code", "codes[j] = code - 1"))
    changed = small_process(cache, root)
    assert (changed["codes"], changed["hits"]) == ([126], [0, 0])


def test_kernels_work_where_nothing_can_be_written() -> None:
    """numba refuses to cache there."""

    def double(x: int) -> int:
        return 2 * x

    double.__code__ = double.__code__.replace(co_filename="/nowhere/at/all.py")
    assert kernel(double)(21) == 42


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
