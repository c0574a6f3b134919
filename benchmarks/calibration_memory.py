"""Peak memory of calibration on models of 4, 8 and 16 layers: python benchmarks/calibration_memory.py

Each model is made, calibrated by one thread in a process of its own with a work folder beside it, and removed. Memory
is what the process has more at its peak than when calibration begins, Linux only.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from large_model import config, write_model
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

from fxquant.calibration.resume_folder import STATE, calibration_folder
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import prepare
from fxquant.frontend.source import open_source
from fxquant.policy.policy import load_policy

SHAPE = {
    "hidden_size": 1024,
    "moe_intermediate_size": 512,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32_000,
    "num_experts_per_tok": 4,
}
EXPERTS, SAMPLES, LENGTH = 16, 32, 128


def main() -> None:
    """Print a row a model, and memory and seconds a layer, last / first."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--policy", default="deepseek_w4a8_per_channel_static")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(Path(options.measure), options.policy)))
        return
    table = Table("layers", "source MB", "latents of all layers MB", "peak MB", "state MB", "seconds")
    runs = [run(layers, options.policy) for layers in options.layers]
    for layers, (state, latents, calibration) in zip(options.layers, runs, strict=True):
        numbers = (state / 1e6, latents / 1e6, calibration["peak"] / 1e6, calibration["state"] / 1e6)
        table.add_row(str(layers), *(f"{number:.0f}" for number in numbers), f"{calibration['seconds']:.1f}")
    first, last = runs[0][2], runs[-1][2]
    paces = [calibration["seconds"] / layers for layers, (_, _, calibration) in zip(options.layers, runs, strict=True)]
    table.caption = f"last / first: peak {last['peak'] / first['peak']:.2f}, seconds a layer {paces[-1] / paces[0]:.2f}"
    Console(width=110).print(table)


def run(layers: int, policy: str) -> tuple[int, int, dict[str, float]]:
    """Bytes of the source and of the latents of the text, and what was measured."""
    document = config(layers, EXPERTS, **SHAPE)
    with tempfile.TemporaryDirectory(dir=".") as place:
        folder = Path(place) / "model"
        source = write_model(folder, document)
        ids = torch.randint(SHAPE["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
        save_file({"ids": ids}, Path(place) / "ids.safetensors")
        command = [sys.executable, __file__, "--measure", place, "--policy", policy]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    latents = layers * SAMPLES * LENGTH * (document["kv_lora_rank"] + document["qk_rope_head_dim"]) * 4
    return source, latents, json.loads(done.stdout)


def measure(place: Path, policy: str) -> dict[str, float]:
    """Peak bytes, bytes of the largest state, and seconds of calibration alone."""
    torch.set_num_threads(1)  # at these sizes threads wait for each other, for long where the machine is busy
    figures: dict[str, float] = {"state": 0}

    @contextmanager
    def report(stage: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if stage != "calibrate":
            yield lambda amount: None
            return
        before, began = memory("VmRSS"), time.perf_counter()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        yield lambda amount: figures.update(state=max(figures["state"], state_bytes(place)))
        figures.update(peak=memory("VmHWM") - before, seconds=time.perf_counter() - began)

    source, options = open_source(place / "model"), CompileOptions(calib=place / "ids.safetensors")
    with calibration_folder(place / "out", False, source.checkpoint) as folder:
        prepare(source, load_policy(policy), options, report, folder=folder)
    return figures


def state_bytes(place: Path) -> int:
    """Of what a killed calibration would go on with."""
    state = place / "out.calibrating" / STATE
    return state.stat().st_size if state.is_file() else 0


def memory(key: str) -> int:
    """Bytes of this process, by the name of the kernel's count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
