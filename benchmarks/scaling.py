"""What a second worker and further layers cost: python benchmarks/scaling.py

Workers: filling the weight files of one expert layer with --jobs 1 and 2, beside two independent processes that do the
same at the same time, each with --jobs 1, which is what the machine can give. Sources and outputs are in memory
(--memory), so that no disk is measured. Layers: whole fills on the disk (--folder), until the bytes are on it.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from large_model import config, source_bytes, write_model
from rich.console import Console
from rich.table import Table

POLICY, VOCABULARY = "deepseek_w4a8_dynamic", 4096


def main() -> None:
    """Print seconds, processor seconds and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), help="a file system in memory")
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="on a disk")
    parser.add_argument("--json", action="store_true", help="print numbers instead of tables")
    parser.add_argument("--fill", nargs=4, metavar=("MODEL", "OUT", "JOBS", "PLACE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fill:
        fill(*options.fill)
        return
    check_space(options.memory, source_bytes(shape(1, options.experts)) * 2)
    check_space(options.folder, source_bytes(shape(max(options.layers), options.experts)) * 2)
    report = {
        "workers": workers(options.memory, options.experts, options.rounds),
        "layers": layers(options.folder, options.experts, options.layers, options.rounds),
    }
    print(json.dumps(report, indent=2)) if options.json else show(report)


def shape(count: int, experts: int) -> dict[str, Any]:
    """So many expert layers under a small vocabulary."""
    return config(count, experts, vocab_size=VOCABULARY)


def check_space(folder: Path, needed: int) -> None:
    """End with what is missing."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        sys.exit(f"{folder}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} free. Take fewer --experts.")


def fill(model: str, out: str, jobs: str, place: str) -> None:
    """In a process of its own: plan, reserve, say that it is ready, wait for a line, fill, print what that took.

    In "memory" every page is there before; on a "disk" the work ends when the bytes are on it.
    """
    from fxquant import CompileOptions
    from fxquant.checkpoint.checkpoint import open_checkpoint
    from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
    from fxquant.compilation.prepare import prepare
    from fxquant.engines.table import ENGINES, Target
    from fxquant.frontend.source import open_source
    from fxquant.lowering.output_folder.layout import MAX_SHARD_SIZE, plan_files, stored_tensors
    from fxquant.lowering.weights import CheckpointProducer, Workers, write_weights
    from fxquant.lowering.weights.journal import begin
    from fxquant.lowering.weights.reserve import reserve, sync
    from fxquant.lowering.weights.work import plan_weights
    from fxquant.policy.policy import load_policy
    from fxquant.progress import silent

    folder, checkpoint = Path(out), open_checkpoint(Path(model))
    program = prepare(open_source(Path(model)), load_policy(POLICY), CompileOptions()).program
    files = plan_files(stored_tensors(program, checkpoint), MAX_SHARD_SIZE, ENGINES[Target.ASCEND])
    producer = CheckpointProducer(checkpoint, stamp_files(checkpoint_files(checkpoint)))
    plan = plan_weights(files, producer)
    folder.mkdir()
    reserve(files, folder)
    if place == "memory":
        touch(folder)
    journal = begin(folder / "journal.jsonl", {})
    warm_up(plan, producer)
    print("ready", flush=True)
    sys.stdin.readline()
    before, start = processor_seconds(), time.perf_counter()
    write_weights(plan, producer, journal, folder, Workers(jobs=int(jobs)), None, silent)
    if place == "disk":
        sync(folder)
    print(json.dumps({"seconds": time.perf_counter() - start, "cpu": processor_seconds() - before, "out": plan.nbytes}))


def touch(folder: Path) -> None:
    """Have real memory under every page: a virtual machine may fetch it from its host only when it is written."""
    zeros = bytes(1 << 20)
    for path in sorted(folder.iterdir()):
        with path.open("r+b") as file:
            for start in range(0, size := path.stat().st_size, len(zeros)):
                file.write(zeros[: size - start])


def warm_up(plan: Any, producer: Any) -> None:
    """Load the kernels that the work needs."""
    from fxquant.lowering.weights.fill import unit_anew

    for unit in {
        str(unit.recipe and (unit.recipe.scheme, unit.recipe.in_features)): unit for unit in plan.units
    }.values():
        unit_anew(unit, producer)


def processor_seconds() -> float:
    """Of this process, all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def started(model: Path, out: Path, jobs: int, place: str = "memory") -> subprocess.Popen:
    """A process that is ready to fill."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--fill", str(model), str(out), str(jobs), place]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def let_go(processes: list[subprocess.Popen]) -> list[dict[str, float]]:
    """Have all of them fill at once."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    return [json.loads(process.communicate()[0]) for process in processes]


def workers(memory: Path, experts: int, rounds: int) -> dict[str, float]:
    """Medians over rounds of seconds, and of the ratios of each round: its three runs follow one another closely."""
    results: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory(dir=memory, prefix="scaling-") as place:
        model, outs = Path(place) / "model", [Path(place) / "a", Path(place) / "b"]
        size = write_model(model, shape(1, experts))
        for _ in range(rounds):
            (alone,) = let_go([started(model, outs[0], 1)])
            (two,) = let_go([started(model, outs[0], 2)])
            both = let_go([started(model, out, 1) for out in outs])
            shutil.rmtree(outs[1])
            results.append(round_of(alone, two, both))
    return {key: statistics.median(result[key] for result in results) for key in results[0]} | {"source": size}


def round_of(alone: dict[str, float], two: dict[str, float], both: list[dict[str, float]]) -> dict[str, float]:
    """What one round says: seconds, processor seconds, and how they compare."""
    line = {"one": alone["seconds"], "two": two["seconds"], "control": max(b["seconds"] for b in both)}
    line |= {"cpu one": alone["cpu"], "cpu two": two["cpu"], "cpu control": sum(b["cpu"] for b in both) / 2}
    line |= {"speed-up": line["one"] / line["two"], "control speed-up": 2 * line["one"] / line["control"]}
    line |= {key + " ratio": line[key] / line["cpu one"] for key in ("cpu two", "cpu control")}
    return line | {"of control": line["speed-up"] / line["control speed-up"]}


def layers(folder: Path, experts: int, counts: list[int], rounds: int) -> list[dict[str, float]]:
    """For each number of layers, medians over half the rounds; the counts take turns in each, so that a disk that gets
    faster or slower meanwhile does so for all of them."""
    by_count: dict[int, list[dict[str, float]]] = {count: [] for count in counts}
    for _ in range(max(1, rounds // 2)):
        for count in counts:
            with tempfile.TemporaryDirectory(dir=folder, prefix="scaling-") as place:
                size = write_model(Path(place) / "model", shape(count, experts))
                os.sync()
                (run,) = let_go([started(Path(place) / "model", Path(place) / "out", 2, "disk")])
                by_count[count].append(run | {"source": size})
    lines = []
    for count, results in by_count.items():
        line = {key: statistics.median(result[key] for result in results) for key in results[0]}
        lines.append(line | {"layers": count, "ns a byte": line["seconds"] / line["source"] * 1e9})
    return lines


def show(report: dict[str, Any]) -> None:
    """Two tables."""
    console, line = Console(width=120), report["workers"]
    table = Table(title=f"weights of one layer, {line['source'] / 1e9:.2f} GB of source in memory")
    for heading in ("", "seconds", "processor seconds", "speed-up"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("--jobs 1", f"{line['one']:.2f}", f"{line['cpu one']:.2f}", "1.00")
    table.add_row("--jobs 2", f"{line['two']:.2f}", f"{line['cpu two']:.2f}", f"{line['speed-up']:.2f}")
    table.add_row(
        "two processes, --jobs 1 each",
        f"{line['control']:.2f}",
        f"{line['cpu control']:.2f} each",
        f"{line['control speed-up']:.2f}",
    )
    table.caption = f"speed-up / control {line['of control']:.2f}, processor seconds × {line['cpu two ratio']:.2f}, "
    table.caption += f"the control's × {line['cpu control ratio']:.2f}"
    console.print(table)
    table = Table(title="layers on the disk, until all bytes are on it")
    for heading in ("layers", "source GB", "output GB", "seconds", "ns a source byte", "processor seconds"):
        table.add_column(heading, justify="right")
    for row in report["layers"]:
        sizes = (f"{row['source'] / 1e9:.2f}", f"{row['out'] / 1e9:.2f}")
        table.add_row(
            str(row["layers"]), *sizes, f"{row['seconds']:.2f}", f"{row['ns a byte']:.2f}", f"{row['cpu']:.2f}"
        )
    first, last = report["layers"][0], report["layers"][-1]
    table.caption = f"ns a byte, last / first: {last['ns a byte'] / first['ns a byte']:.2f}"
    console.print(table)


if __name__ == "__main__":
    main()
