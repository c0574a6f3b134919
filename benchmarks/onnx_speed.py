"""Rates, load time and memory of the ONNX profiles beside the float graph: python benchmarks/onnx_speed.py [--write]

A random model, wide enough that products of matrices decide, is compiled once for each graph. Every round runs each
graph in a process of its own, with one thread, and times what its processor spends; a figure is the median over rounds
of the smallest of its repeats. Ratios are to the float graph of the same round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from large_model import config, write_model
from rich.table import Table

from fxquant.compilation.options import CompileOptions
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.processes.memory import peak_bytes, resident_bytes
from fxquant.tools.console import console, errors
from fxquant.tools.stages import reporter
from fxquant.verbs.compile import compile

WIDE = {
    "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 512, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 768, "vocab_size": 8192, "first_k_dense_replace": 1,
}  # fmt: skip
GRAPHS: dict[str, tuple[str, OnnxProfile]] = {
    "float": ("float", OnnxProfile.QDQ),
    "w8a8 qdq": ("deepseek_w8a8", OnnxProfile.QDQ),
    "w8a8 integer": ("deepseek_w8a8", OnnxProfile.INTEGER),
    "w4a8 qdq": ("deepseek_w4a8_dynamic", OnnxProfile.QDQ),
    "w4a8 integer": ("deepseek_w4a8_dynamic", OnnxProfile.INTEGER),
}
CALLS = {"prefill 128": (1, 128, 0), "prefill 512": (1, 512, 0), "decode, 128 past": (1, 1, 128)} | {
    "decode, 8 rows": (8, 1, 128),
    "decode, 1024 past": (1, 1, 1024),
}
"""Name → rows, new tokens and tokens before them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--graph", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.graph:
        print(json.dumps(measured(options.graph, options.repeats)))
        return
    with tempfile.TemporaryDirectory(prefix="fxquant-speed-") as folder:
        folders = dict(compiled(Path(folder), options.layers, options.experts))
        rounds = [
            {name: in_process(path, options.repeats) for name, path in folders.items()} for _ in range(options.rounds)
        ]
        console.print(table(rounds, {name: size_of(path) for name, path in folders.items()}))


def compiled(folder: Path, layers: int, experts: int) -> Iterator[tuple[str, Path]]:
    """Each graph's folder."""
    write_model(folder / "model", config(layers, experts, **WIDE))
    tokens = folder / "text.jsonl"
    tokens.write_text("".join(json.dumps(list(range(n, n + 64))) + "\n" for n in range(4)))
    for name, (policy, profile) in GRAPHS.items():
        out = folder / name.replace(" ", "-")
        errors.print(f"compiling {name}")
        options = CompileOptions(
            policy=policy, target=Target.ONNX, out=out, onnx_profile=profile, calib=tokens, verify=False
        )
        compile(folder / "model", options, reporter(False))
        yield name, out


def in_process(folder: Path, repeats: int) -> dict[str, float]:
    """As `measured`, in a process of its own."""
    command = [sys.executable, __file__, "--graph", str(folder), "--repeats", str(repeats)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measured(folder: Path, repeats: int) -> dict[str, float]:
    """Milliseconds of each of CALLS, seconds to load, and bytes of memory that the graph took."""
    before, began = resident_bytes(), time.process_time()
    runner = OnnxRunner(folder, threads=1)
    figures = {"load": time.process_time() - began, "memory loaded": float(resident_bytes() - before)}
    for name, (rows, new, past) in CALLS.items():
        inputs = _inputs(runner, rows, new, past)
        figures[name] = min(1000 * _seconds(runner, inputs) for _ in range(repeats + 1))
    return figures | {"memory peak": float(peak_bytes() - before)}


def _inputs(runner: OnnxRunner, rows: int, new: int, past: int) -> tuple[Any, ...]:
    seed = torch.Generator().manual_seed(0)
    ids = torch.randint(8192, (rows, new), generator=seed)
    positions = torch.arange(past, past + new).expand(rows, new)
    caches = [torch.randn(rows, past, cache.shape[-1], generator=seed) for cache in runner.empty_cache(rows)]
    return ids, torch.ones(rows, past + new, dtype=torch.int64), positions, caches


def _seconds(runner: OnnxRunner, inputs: tuple[Any, ...]) -> float:
    began = time.thread_time()
    runner(*inputs)
    return time.thread_time() - began


def size_of(folder: Path) -> int:
    """Bytes on disk of graph and weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in (".onnx", ".safetensors"))


def table(rounds: list[dict[str, dict[str, float]]], sizes: dict[str, int]) -> Table:
    """A line for each graph; times in milliseconds for the float graph, else as many times as fast."""
    result = Table("graph", *CALLS, "load s", "memory GB", "peak GB", "disk GB")
    for name in GRAPHS:
        cells = []
        for call in CALLS:
            own = statistics.median(figures[name][call] for figures in rounds)
            ratio = statistics.median(figures["float"][call] / figures[name][call] for figures in rounds)
            cells.append(f"{own:.1f} ms" if name == "float" else f"{ratio:.2f} ×")
        machine = [
            statistics.median(figures[name][key] for figures in rounds)
            for key in ("load", "memory loaded", "memory peak")
        ]
        gigabytes = [f"{value / 1e9:.2f}" for value in (*machine[1:], sizes[name])]
        result.add_row(name, *cells, f"{machine[0]:.1f}", *gigabytes)
    return result


if __name__ == "__main__":
    main()
