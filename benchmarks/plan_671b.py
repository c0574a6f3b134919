"""`fxquant plan` of the published 671B configuration in a process of its own: python benchmarks/plan_671b.py

Prints what planning takes, then what it says of a compile on this machine and on 32 cores with a disk of 3 GB/s.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

from fxquant.planning.estimate import PER_WORKER_BYTES
from fxquant.planning.host_benchmark import Machine

POLICY = "deepseek_w4a8_dynamic"
MODEL = Path(str(resources.files("fxquant") / "models" / "deepseek_v3_671b.json"))
CORES, DISK = 32, 3.0
CODE = """
import sys
from fxquant.processes.memory import peak_bytes
from fxquant.tools.main import run
try:
    run()
finally:
    print(peak_bytes(), file=sys.stderr)
"""
"""The command, and after it the largest resident memory of its process."""


def main() -> None:
    """The fastest of `--rounds` runs of the command, and the arithmetic of both estimates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=MODEL, help="config.json; default: the published sizes")
    parser.add_argument("--policy", default=POLICY)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print numbers instead of text")
    options = parser.parse_args()
    runs = [measured(options.config, options.policy) for _ in range(options.rounds)]
    best = min(runs, key=lambda run: run["seconds"])
    best["what if"] = measured(options.config, options.policy, "--cores", str(CORES), "--disk", str(DISK))["plan"]
    print(json.dumps(best, indent=2)) if options.json else print("\n".join(lines(best)))


def measured(config: Path, policy: str, *more: str) -> dict[str, Any]:
    """Wall and CPU seconds of the command from start to exit, peak bytes of its processes together, and its answer."""
    command = [sys.executable, "-c", CODE, "plan", str(config), "-p", policy, "--json", *more]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    plan, own = json.loads(done.stdout), int(done.stderr.split()[-1])
    peak = own + plan["machine"]["peak_bytes"]
    return {"seconds": seconds, "cpu seconds": used, "peak bytes": peak, "plan": plan}


def lines(best: dict[str, Any]) -> list[str]:
    """What a reader wants to know."""
    plan = best["plan"]
    return [
        f"plan       {best['seconds']:.2f} s ({best['cpu seconds']:.2f} s of processor time with what measures), "
        f"{best['peak bytes'] / 1e6:,.0f} MB of both processes",
        f"operators  {plan['operators'][0]:,} in the float graph, {plan['operators'][1]:,} rewritten",
        f"bytes      {plan['bytes_in']:,} in, {plan['bytes_out']:,} out in {len(plan['files'])} weight files",
        *estimate_lines("this machine", plan),
        *estimate_lines(f"{CORES} cores", best["what if"]),
    ]


def estimate_lines(title: str, plan: dict[str, Any]) -> list[str]:
    """Seconds and bytes with their arithmetic."""
    spent, memory, machine = plan["time"], plan["memory"], Machine(**plan["machine"])
    work = " + ".join(
        f"{amount / 1e9:,.2f} G / {machine.kernels[kernel]:.2f} G/s ({kernel})"
        for kernel, amount in plan["work"].items()
        if kernel in machine.kernels
    )
    disk = "unknown"
    if spent["disk"] is not None:
        disk = f"{plan['bytes_in'] / 1e9:,.1f} GB / {machine.disk_read:.2f} GB/s + {plan['bytes_out'] / 1e9:,.1f} GB / "
        disk += f"{machine.disk_write:.2f} GB/s = {spent['disk']:,.0f} s"
    least = "" if spent["complete"] else "at least "
    workers = f"{spent['workers']} × {PER_WORKER_BYTES / 1e6:.1f}"
    return [
        f"{title}: {least}{spent['total']:,.0f} s, {memory['peak'] / 1e9:.2f} GB",
        f"  time     max of both + {spent['fixed']:.1f} s of tracing, passes and layout",
        f"  disk     {disk}",
        f"  compute  ({work}) / {spent['workers']} = {spent['computing']:,.0f} s",
        f"  memory   {memory['base'] / 1e6:,.0f} + {memory['kernels'] / 1e6:,.0f} + {workers} MB",
    ]


if __name__ == "__main__":
    main()
