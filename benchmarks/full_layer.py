"""One expert layer of DeepSeek-V3's size, compiled: python benchmarks/full_layer.py [--experts 256]

Beside it, in the same run: reading the source to nothing and then writing as many bytes as the output has, and the
kernels alone over the same weights. The source is not in the page cache when it is read. A first round does not count:
the disks of virtual machines are several times as slow where they are written for the first time. Everything is deleted
after.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large_model import config, source_bytes, write_model
from rich.console import Console
from rich.table import Table

from fxquant.kernels.module_tensors import ModuleMaker
from fxquant.kernels.source_rows import SourceRows
from fxquant.schemes.schemes import Recipe, Scheme

BLOCK = 4 << 20
POLICY = "deepseek_w4a8_dynamic"
COMPILE = """
import json, sys, time
start = time.perf_counter()
from fxquant import CompileOptions, compile
from fxquant.lowering.weights import Workers
from fxquant.processes.memory import peak_bytes
from contextlib import contextmanager
stages = {}
@contextmanager
def report(stage, total, unit):
    began = time.perf_counter()
    yield lambda amount: None
    stages[stage] = time.perf_counter() - began
model, out, policy, jobs = sys.argv[1:5]
options = CompileOptions(policy=policy, out=out, verify=False, export=False, workers=Workers(jobs=int(jobs)))
written = compile(model, options, report).output
size = sum(file.nbytes for file in written.files)
print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_bytes(), "bytes": size, "stages": stages}))
"""
"""A process of its own from its first import on; what it did not do is named in the README."""


def main() -> None:
    """Print seconds, ratios and peak memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--experts-small", type=int, default=16, help="a second model, to see that memory is flat")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on the disk to measure")
    parser.add_argument("--json", action="store_true", help="print numbers instead of a table")
    options = parser.parse_args()
    check_disk(options.folder, options.experts)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="full-layer-") as place:
        counts = (options.experts_small, options.experts)
        lines = [measured(Path(place), count, options.jobs, options.rounds) for count in counts]
    print(json.dumps(lines, indent=2)) if options.json else Console(width=120).print(table(lines))


def check_disk(folder: Path, experts: int) -> None:
    """Source, output and the baseline's bytes must fit."""
    needed, free = 3 * source_bytes(config(1, experts)), shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f"{folder}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} free. Take fewer --experts.")


def measured(place: Path, experts: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Medians of `rounds` rounds after the first, in each of which everything is measured."""
    model = place / f"model-{experts}"
    size = write_model(model, config(1, experts))
    results = [one_round(place, model, experts, jobs) for _ in range(1 + rounds)][1:]
    shutil.rmtree(model)
    line: dict[str, Any] = {
        key: statistics.median(result[key] for result in results) for key in results[0] if key != "stages"
    }
    line |= {"experts": experts, "source": size, "stages": results[-1]["stages"]}
    line["limit"] = max(line["read"] + line["write"], line["kernels"])
    return line | {"ratio": line["seconds"] / line["limit"], "ratio of fill": line["fill"] / line["limit"]}


def one_round(place: Path, model: Path, experts: int, jobs: int) -> dict[str, Any]:
    out = place / "out"
    weights = model / "model.safetensors"
    forget(weights)
    compiled = json.loads(run([sys.executable, "-c", COMPILE, str(model), str(out), POLICY, str(jobs)]))
    shutil.rmtree(out)
    os.sync()
    read = seconds_to_read(weights)
    write = seconds_to_write(place / "written", compiled["bytes"])
    fill = sum(compiled["stages"].values()) - sum(compiled["stages"].get(name, 0) for name in ("open", "trace"))
    return compiled | {"read": read, "write": write, "fill": fill, "kernels": seconds_of_kernels(experts, jobs)}


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(command: list[str]) -> str:
    """Standard output of a process of its own."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def seconds_to_read(path: Path) -> float:
    """As `cat` to nothing, from the disk."""
    forget(path)
    buffer, start = memoryview(bytearray(BLOCK)), time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - start


def seconds_to_write(path: Path, size: int) -> float:
    """Random bytes, until they are on the disk."""
    block, start = os.urandom(BLOCK), time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for offset in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - offset)])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def seconds_of_kernels(experts: int, jobs: int) -> float:
    """All routed projections by `jobs` threads, from memory and to memory; a second expert's worth is repeated."""
    calls = [kernel_call(n, k, parallel) for n, k, parallel in ((2048, 7168, False), (7168, 2048, True))] * jobs
    counts = [2 * experts, experts] * jobs
    for call in calls:
        call()
    start = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda work: [work[0]() for _ in range(work[1] // jobs)], zip(calls, counts, strict=True)))
    return time.perf_counter() - start


def kernel_call(n: int, k: int, row_parallel: bool) -> Any:
    """A call that quantizes one FP8 weight [n, k] in blocks of 256 rows."""
    raw = torch.randn(256, k).mul(112).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(-1)
    scales = np.full((n // 128, k // 128), 2e-4, np.float32)
    recipe = Recipe("w", ("w",), Scheme.W4A8_DYNAMIC, 256, n, k, False, row_parallel, torch.bfloat16)
    maker = ModuleMaker(recipe, "w")

    def call() -> None:
        for start in range(0, n, 256):
            maker.rows(SourceRows(raw, torch.float8_e4m3fn, k, start, torch.bfloat16, scales))

    return call


COLUMNS = {
    "experts": "experts", "source": "source GB", "bytes": "output GB", "read": "read s", "write": "write s",
    "kernels": "kernels s", "seconds": "compile s", "fill": "of that, weights and documents s", "ratio": "ratio",
    "ratio of fill": "without start", "peak": "peak MB",
}  # fmt: skip
"""Key → heading. The ratio is compile / max(read + write, kernels)."""


def table(lines: list[dict[str, Any]]) -> Table:
    """A row a model."""
    shown = Table(title=f"one expert layer, {POLICY}; ratio: compile / max(read + write, kernels)")
    for heading in COLUMNS.values():
        shown.add_column(heading, justify="right")
    for line in lines:
        shown.add_row(*(cell(key, line[key]) for key in COLUMNS))
    return shown


def cell(key: str, value: float) -> str:
    """Bytes as GB or MB."""
    if key == "experts":
        return str(value)
    return f"{value / 1e6:,.0f}" if key == "peak" else f"{value / (1e9 if key in ('source', 'bytes') else 1):.2f}"


if __name__ == "__main__":
    main()
