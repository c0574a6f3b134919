"""The ONNX graph of the published model, from its config alone: python benchmarks/onnx_scale.py

61 layers of 256 experts, under deepseek_w4a8_dynamic, which needs no text. Prints what a compile spends on the graph,
beside its weights: each profile in a process of its own, which traces, quantizes, lays out files and emits.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import onnx_ir as ir
from rich.table import Table

from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import passes_for
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import ENGINES, onnx_targets
from fxquant.frontend.source import open_source
from fxquant.lowering.onnx.deployment import deployment
from fxquant.lowering.onnx.writer import build_model
from fxquant.lowering.output_folder.layout import FileLayout, plan_files, stored_tensors
from fxquant.passes import run_passes
from fxquant.planning.config_checkpoint import config_checkpoint
from fxquant.planning.contents import RangesLater
from fxquant.policy.policy import load_policy
from fxquant.processes.memory import peak_bytes
from fxquant.program.program import Program
from fxquant.storage.safetensors import TensorInfo
from fxquant.tools.console import console

POLICY = "deepseek_w4a8_dynamic"
MODEL = Path(str(resources.files("fxquant") / "models" / "deepseek_v3_671b.json"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=MODEL, help="config.json; default: the published sizes")
    parser.add_argument("--profile", type=OnnxProfile, choices=list(OnnxProfile), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.profile:
        print(json.dumps(emitted(options.config, options.profile)))
        return
    table = Table("profile", "trace and passes s", "graph s", "peak GB", "nodes", "MB")
    for profile in OnnxProfile:
        command = [sys.executable, __file__, "--config", str(options.config), "--profile", profile]
        figures = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        table.add_row(profile.value, *figures)
    console.print(table)


def emitted(config: Path, profile: OnnxProfile) -> list[str]:
    """The cells of a profile."""
    began = time.perf_counter()
    program, files = quantized(config, profile)
    half = time.perf_counter()
    form = OnnxForm(profile)
    model = build_model(deployment(program, form).program, dict(placed(files)), form)
    size = len(ir.to_proto(model).SerializeToString(deterministic=True))
    ended = time.perf_counter()
    nodes = sum(1 for _ in ir.traversal.RecursiveGraphIterator(model.graph))
    return [
        f"{half - began:.1f}",
        f"{ended - half:.1f}",
        f"{peak_bytes() / 1e9:.2f}",
        f"{nodes:,}",
        f"{size / 1e6:.0f}",
    ]


def quantized(config: Path, profile: OnnxProfile) -> tuple[Program, list[FileLayout]]:
    """The rewritten program, and the weight files as a compile lays them out."""
    options = CompileOptions(policy=POLICY, target=onnx_targets()[0], onnx_profile=profile)
    source = open_source(config, config_only=True)
    program, policy = source.program(), load_policy(POLICY)
    source = replace(source, checkpoint=config_checkpoint(source.checkpoint, program, source.config))
    run_passes(program, passes_for(source, policy, options, (), RangesLater()))
    return program, plan_files(
        stored_tensors(program, source.checkpoint), options.max_shard_size, ENGINES[options.target]
    )


def placed(files: list[FileLayout]) -> Iterator[tuple[str, TensorInfo]]:
    """Name → place of every tensor."""
    for file in files:
        for tensor, offset in zip(file.tensors, file.offsets, strict=True):
            spec = tensor.spec
            yield (
                tensor.name,
                TensorInfo(tensor.name, spec.dtype, spec.shape, Path(file.name), offset, offset + spec.nbytes),
            )


if __name__ == "__main__":
    main()
