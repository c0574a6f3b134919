"""Rates, load time, memory and divergence of our ONNX graphs beside the float graph and what others make of it.

python benchmarks/onnx_speed.py [MODEL] [--text FILE] [--calib FILE]
    A trained model, else the shipped example. KL divergence is from our float graph, over documents of FILE.
python benchmarks/onnx_speed.py --wide
    A random model, wide enough that products of matrices decide: hidden size 2048, --layers, --experts.

Each round runs every row in a process of its own, with one thread; a figure is the median over rounds of the least of
the repeats, a ratio the median of those to the float graph in the same round. onnxruntime runs with
session.x64quantprecision where the processor has no VNNI, in all rows. --rows takes those with one of the words.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from large_model import config, write_model
from onnx_speed_process import CALLS, Row
from onnx_speed_rows import FLOAT, Make, MissingRowError, Subjects

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.evaluation.divergence import document_scores, summary
from fxquant.lowering.onnx.runner import products_saturate
from fxquant.text.load import load_batches
from fxquant.tools.console import console, errors

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_deepseek_v3"
POLICIES = ("deepseek_w4a8_dynamic", "deepseek_w8a8")
WIDE = {
    "hidden_size": 2048, "intermediate_size": 4096, "moe_intermediate_size": 512, "num_attention_heads": 16,
    "num_key_value_heads": 16, "q_lora_rank": 768, "vocab_size": 8192, "first_k_dense_replace": 1,
    "torch_dtype": "bfloat16",
}  # fmt: skip
CPU, WALL = 0, 1
PROCESS = Path(__file__).parent / "onnx_speed_process.py"

Figures = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=EXAMPLE)
    parser.add_argument("--wide", action="store_true")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--text", type=Path, default=EXAMPLE / "evaluation.jsonl")
    parser.add_argument("--calib", type=Path, default=EXAMPLE / "calibration.jsonl")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--documents", type=int, default=32, help="of --text, 256 tokens at most of each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS))
    parser.add_argument("--rows", nargs="+", metavar="WORD", help="only these; the float graph is always there")
    parser.add_argument("--limit", type=int, default=900, help="seconds that a process may take")
    parser.add_argument("--json", type=Path, help="write every figure of every round")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fxquant-speed-") as scratch:
        run(options, Path(scratch))


def run(options: argparse.Namespace, scratch: Path) -> None:
    """Make the rows, measure them and print the tables."""
    model, calib = wide_model(options, scratch) if options.wide else (options.model, options.calib)
    rows, stopped = made(Subjects(model, calib, tuple(options.policies), scratch).rows(), options.rows)
    divergences = {} if options.wide else dict(kl(rows, options, scratch))
    rounds = [dict(measured(rows, stopped, options)) for _ in range(options.rounds)]
    kept = {name: row for name, row in rows.items() if name not in stopped}
    for clock, title in ((CPU, "processor time"), (WALL, "wall time")):
        console.print(f"\ntokens a second, {title}\n", highlight=False)
        print("\n".join(table(kept, rounds, clock, options.calls)))
    print("\nload, memory and size\n")
    print("\n".join(loads(kept, rounds, divergences)))
    print("\n".join(f"- {name}: {why}" for name, why in stopped.items()))
    print(f"\n{machine()}")
    if options.json:
        sizes = {name: row.bytes for name, row in kept.items()}
        document = {"machine": machine(), "rounds": rounds, "bytes": sizes, "kl": divergences}
        options.json.write_text(json.dumps(document, indent=1))


def wide_model(options: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """A random checkpoint in bfloat16, and token ids that say nothing."""
    document = config(options.layers, options.experts, **WIDE)
    del document["quantization_config"]
    write_model(scratch / "model", document)
    tokens = scratch / "tokens.npy"
    np.save(tokens, np.arange(4 * 64).reshape(4, 64))
    return scratch / "model", tokens


def made(rows: dict[str, Make], words: list[str] | None) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows with one of the words, and of those that are missing why."""
    done, missing = {}, {}
    for name, make in rows.items():
        if words is None or name == FLOAT or any(word in name for word in words):
            try:
                done[name] = make()
            except MissingRowError as reason:
                missing[name] = str(reason)
    return done, missing


def measured(rows: dict[str, Row], stopped: dict[str, str], options: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    """One round: each row's figures. One that fails is not tried again; `stopped` gets its last words."""
    for name, row in rows.items():
        if name in stopped:
            continue
        errors.print(f"measuring {name}")
        said = process(row, options.limit, "--repeats", str(options.repeats), "--calls", *options.calls)
        if said.returncode:
            stopped[name] = last_line(said)
        else:
            yield name, json.loads(said.stdout.splitlines()[-1])


def process(row: Row, limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """onnx_speed_process.py for a row."""
    command = [sys.executable, str(PROCESS), row.as_json(), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"took more than {limit} s")


def last_line(said: subprocess.CompletedProcess[str]) -> str:
    return (said.stderr.strip().splitlines() or [f"ended with {said.returncode}"])[-1][-200:]


def kl(rows: dict[str, Row], options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, float]]:
    """Nats a token of each row from the float graph."""
    ids = scratch / "ids.npz"
    batches = load_batches(options.text, open_checkpoint(options.model), options.documents, 256)
    np.savez(ids, **{str(number): batch.numpy() for number, batch in enumerate(batches)})
    expected: list[torch.Tensor] = []
    for name, row in rows.items():
        if row.way == "torch.compile":  # the same operators as eager, compiled for each length
            continue
        errors.print(f"divergence of {name}")
        out = scratch / "logits.npz"
        if process(row, options.limit, "--logits", str(ids), str(out)).returncode:
            continue
        with np.load(out) as stored:
            logits = [torch.from_numpy(stored[str(number)]) for number in range(len(batches))]
        expected = expected or logits
        yield name, summary(document_scores(batches, expected, logits)).kl_mean


def table(rows: dict[str, Row], rounds: list[Figures], clock: int, calls: list[str]) -> Iterator[str]:
    """Lines of markdown: tokens a second, and how many times as many as the float graph."""
    yield f"| row | {' | '.join(calls)} |"
    yield "|---|" + "---|" * len(calls)
    for name in rows:
        cells = []
        for call in calls:
            count, new, _ = CALLS[call]
            own = statistics.median(figures[name][call][clock] for figures in rounds)
            ratio = statistics.median(figures[FLOAT][call][clock] / figures[name][call][clock] for figures in rounds)
            cells.append(f"{count * new / own:.4g}" + ("" if name == FLOAT else f", {ratio:.2f} ×"))
        yield f"| {name} | {' | '.join(cells)} |"


def loads(rows: dict[str, Row], rounds: list[Figures], divergences: dict[str, float]) -> Iterator[str]:
    """Lines of markdown: seconds to load, memory when loaded and its maximum before, after all calls, disk, KL."""
    heads = [
        "load s (processor)",
        "wall",
        "loaded GB",
        "/ float",
        "peak of load GB",
        "/ disk",
        "peak GB",
        "disk GB",
        "KL",
    ]
    yield f"| row | {' | '.join(heads)} |"
    yield "|---|" + "---|" * len(heads)
    for name, row in rows.items():
        cpu, wall = (statistics.median(figures[name]["load"][clock] for figures in rounds) for clock in (CPU, WALL))
        loaded, high, peak = (
            statistics.median(figures[name][key] for figures in rounds) for key in ("loaded", "load peak", "peak")
        )
        ratio = statistics.median(figures[name]["loaded"] / figures[FLOAT]["loaded"] for figures in rounds)
        gigabytes = [f"{size / 1e9:.3g}" for size in (loaded, high, peak, row.bytes)]
        divergence = f"{divergences[name]:.5f}" if name in divergences else ""
        cells = [f"{cpu:.2f}", f"{wall:.2f}", gigabytes[0], f"{ratio:.2f}", gigabytes[1], f"{high / row.bytes:.1f}"]
        yield f"| {name} | {' | '.join([*cells, *gigabytes[2:], divergence])} |"


def machine() -> str:
    """What a reader must know of it."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    vnni = "without VNNI" if products_saturate() else "with VNNI, or not x86"
    return (
        f"{os.cpu_count()} cores, {names[0] if names else 'unknown processor'}, {vnni}; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
