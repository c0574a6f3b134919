"""A fault at the N-th operation on files of every command that writes: python benchmarks/faults.py --rounds 1000

Prints a table of what lay under the final name after the fault, and whether the same command completed.
"""

import argparse
import gc
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

import torch
from faults.campaign import plan, prepared, run_rounds, table
from faults.operations import Fault
from faults.ray_rounds import ray_rounds
from faults.scenarios import scenarios
from kept import Kept
from remembered import computed_once, exported_once, traced_once

import fxquant
from fxquant import CompileOptions

SHARED_MEMORY = Path("/dev/shm")


def main() -> int:
    """0 where every round was right."""
    names = [scenario.name for scenario in scenarios()]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--ray", type=int, default=0, metavar="ROUNDS", help="Rounds with Ray, half a minute each.")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--command", action="append", default=[], choices=names)
    parser.add_argument("--fault", action="append", default=[], choices=list(Fault))
    parser.add_argument("--at", type=int, help="Only this operation.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="fxquant-faults-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    start = time.monotonic()
    try:
        kept = Kept(base / "kept")
        with traced_once(), computed_once(kept), exported_once(kept):
            results = _rounds(base, options) if options.rounds else []
        results += ray_rounds(options.ray, base) if options.ray else []
    finally:
        shutil.rmtree(base)
    for result in results:
        if result.wrong:
            text = "\n    ".join(result.wrong)
            print(
                f"{result.scenario}: {result.fault} at {result.at} ({result.operation}):\n    {text}", file=sys.stderr
            )
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        kinds = Counter(result.operation for result in results)
        print(table(results))
        print(f"\n{len(results):,} rounds in {time.monotonic() - start:,.0f} s; at: ", end="")
        print(", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())))
    return 1 if any(result.wrong for result in results) else 0


def _rounds(base: Path, options: argparse.Namespace) -> list:
    selected = [scenario for scenario in scenarios() if not options.command or scenario.name in options.command]
    ready = prepared(selected, base) if _warm(base) else []
    total = sum(scenario.share for scenario in ready)
    rounds = [item for scenario in ready for item in plan(scenario, -(-options.rounds * scenario.share // total))]
    faults = set(map(Fault, options.fault)) or set(Fault)
    rounds = [item for item in rounds if item[1] in faults]
    if options.at is not None:
        rounds = [(scenario, fault, options.at) for scenario in ready for fault in faults]
    return run_rounds(rounds, base, options.jobs)


def _warm(base: Path) -> bool:
    """Import, trace, export and compile kernels here, so that children need not: they know what was computed here."""
    from faults.scenarios import write_template

    folder = write_template(base / "warm")
    for number, name in enumerate(("deepseek_w8a8", "gptq.yaml", "other.yaml", "data_free.yaml")):
        policy = str(folder / name) if name.endswith("yaml") else name
        whole, calib = name == "data_free.yaml", folder / "text.safetensors"
        options = CompileOptions(policy=policy, out=folder / f"o{number}", calib=calib, export=whole, verify=whole)
        fxquant.compile(folder / "checkpoint", options)
    shutil.rmtree(folder)
    gc.collect()
    gc.freeze()  # else each child walks, and so copies, all that was imported
    return True


if __name__ == "__main__":
    sys.exit(main())
