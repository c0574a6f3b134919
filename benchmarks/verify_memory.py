"""Peak memory and time of `verify` on a wide model: python benchmarks/verify_memory.py

One dense and one expert layer of DeepSeek-V3's width in bfloat16, random weights, without calibration. Compile and
verification are processes of their own; Linux only. The model and the outputs take 11 GB beside the current folder.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from large_model import config, write_model
from rich.console import Console
from rich.table import Table

from fxquant.api import CompileOptions, compile, verify
from fxquant.engines.table import Target
from fxquant.processes.memory import peak_bytes

VOCABULARY, EXPERTS = 129_280, 8


def main() -> None:
    """Print a row a target and command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--targets", nargs="+", default=["ascend", "onnx"])
    parser.add_argument("--policy", default="deepseek_w4a8_dynamic")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    shape = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4}
    document = config(2, EXPERTS, vocab_size=options.vocabulary, torch_dtype="bfloat16", **shape)
    del document["quantization_config"]
    table = Table("target", "command", "peak GB", "seconds", "CPU seconds", "verdict")
    with tempfile.TemporaryDirectory(dir=".") as place:
        source = write_model(Path(place) / "model", document)
        for target in options.targets:
            for command in ("compile", "verify"):
                call = [sys.executable, __file__, "--measure", place, command, target, options.policy]
                done = subprocess.run(call, check=True, capture_output=True, text=True)
                peak, seconds, cpu, verdict = json.loads(done.stdout.splitlines()[-1])
                table.add_row(target, command, f"{peak / 1e9:.2f}", f"{seconds:.0f}", f"{cpu:.0f}", verdict)
    table.caption = f"source {source / 1e9:.2f} GB"
    Console(width=110).print(table)


def measure(place: str, command: str, target: str, policy: str) -> tuple[int, float, float, str]:
    """Peak bytes, seconds, CPU seconds and the verdict of one command in this process."""
    out, began, verdict = Path(place) / target, time.perf_counter(), ""
    if command == "compile":
        options = CompileOptions(policy=policy, target=Target(target), out=out, verify=False)
        compile(Path(place) / "model", options)
    else:
        verdict = verify(out).verdict
    used = resource.getrusage(resource.RUSAGE_SELF)
    return peak_bytes(), time.perf_counter() - began, used.ru_utime + used.ru_stime, verdict


if __name__ == "__main__":
    main()
