"""The reference quantizer beside us, on the same models and text: python benchmarks/reference_quantizer.py [MODELS]

MODELS is a folder of checkpoints with a calib.txt and a val.txt; default: ../shared/models/tiny, where that is. The
tool is installed from PyPI into an environment of its own, in the cache folder; nothing of it is imported here. It runs
its own practice for DeepSeek, int4 experts per channel, without its device: reference_driver.py says what stands in for
it, reference_model.py what it takes as the model's code. Its adapter always quantizes one more layer than config.json
has, that of multi-token prediction: these models have none, so it gets a copy of the last one, which is dropped again.

Both calibrate on the same windows, both outputs are read from their files by the same code and scored on the same text.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import fxquant
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.table import ENGINES, Target
from fxquant.evaluation.divergence import Evaluation, evaluate_programs
from fxquant.foreign.found import find_folder
from fxquant.foreign.program import found_program
from fxquant.frontend.source import Source, open_source
from fxquant.program.program import Program
from fxquant.runtime.weight_providers import Cached, Read
from fxquant.text.load import load_batches
from fxquant.tools.console import console, errors, size
from fxquant.tools.stages import reporter
from fxquant.verification.foreign_weights import ForeignWeights

HERE = Path(__file__).parent
PACKAGES = ("msmodelslim==26.1.0", "torch>=2.8,<2.14", "transformers==4.51.3")
"""transformers: the last release but few whose experts are modules of their own, as the tool wants them."""
PRACTICE = "lab_practice/deepseek_v3/deepseek_w4a8_per_channel.yaml"
MODEL_TYPE = "DeepSeek-R1-0528"
SHARD = "model-{:05d}-of-000163.safetensors"
"""The tool reads the prediction layer from the last of 163 files, as layer 61, whatever the model."""
MODELS = HERE.parent.parent / "shared" / "models" / "tiny"
NAMES = ("bf16", "outlier")
POLICIES = (
    "deepseek_w4a8_msmodelslim_per_channel",
    "deepseek_w4a8_per_channel",
    "deepseek_w4a8_per_channel_static",
    "deepseek_w4a8",
)
TARGETS = (Target.VLLM_ASCEND, Target.ASCEND)
HEADINGS = (
    "integers",
    "verify",
    "perplexity",
    "/ float",
    "KL per token",
    "95 %",
    "seconds",
    "peak",
    "weights",
)


@dataclass(frozen=True)
class Row:
    """An output in `folder`, and what making it took: seconds, and bytes of memory at the peak."""

    label: str
    folder: Path
    seconds: float
    peak: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="?", default=MODELS)
    parser.add_argument("--names", nargs="*", default=NAMES, help="checkpoints of MODELS")
    parser.add_argument("--policies", nargs="*", default=POLICIES)
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--documents", type=int, default=64, help="documents to score")
    parser.add_argument("--seq-len", type=int, default=256)
    options = parser.parse_args()
    if not options.models.is_dir():
        print(f"{options.models}: no such folder; pass a folder of checkpoints with calib.txt and val.txt")
        return 2
    python = environment()
    first, *others = options.names
    with tempfile.TemporaryDirectory() as place:
        for table in measure(options, first, python, Path(place)):
            console.print(table)
    if not others:
        return 0
    command = [sys.executable, __file__, options.models, "--names", *others, "--policies", *options.policies]
    for name in ("samples", "documents", "seq_len"):
        command += [f"--{name.replace('_', '-')}", getattr(options, name)]
    console.file.flush()
    # a process of its own: a child's memory at the peak is never less than that of the process that starts it
    return subprocess.run(list(map(str, command)), check=False).returncode


def environment() -> Path:
    """Python of the tool's environment, made once."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "fxquant" / "reference_quantizer"
    python = cache / "bin" / "python"
    if not (cache / "complete").is_file():
        venv.create(cache, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (cache / "complete").touch()
    return python


def measure(options: argparse.Namespace, name: str, python: Path, place: Path) -> tuple[Table, Table]:
    """The rows of one model, and its errors by layer."""
    table = Table(*HEADINGS, title=f"{name}: the reference quantizer beside fxquant")
    layers = Table("integers", title=f"{name}: squared weight error / squares of the weight, by layer")
    source = open_source(options.models / name)
    calib, text = options.models / "calib.txt", options.models / "val.txt"
    windows = load_batches(calib, source.checkpoint, options.samples, options.seq_len)
    rows = list(reference(source, windows, python, place))
    rows += [ours(source, windows, policy, place) for policy in options.policies]
    documents = load_batches(text, source.checkpoint, options.documents, options.seq_len)
    opened = [open_row(row, source) for row in rows]
    original = (source.program(), Cached(source.checkpoint.read))
    candidates = [(program, read) for program, read, _ in opened]
    results = evaluate_programs(original, candidates, documents, reporter(quiet=not errors.is_terminal))
    for row, (_, _, weights), result in zip(rows, opened, results, strict=True):
        verdict = fxquant.verify(row.folder, against=options.models / name).verdict
        table.add_row(row.label, verdict, *figures(row, result))
        each = list(by_layer(weights))
        for layer, _ in each[len(layers.columns) - 1 :]:
            layers.add_column(f"layer {layer}")
        layers.add_row(row.label, *(f"{error:.2e}" for _, error in each))
    return table, layers


def figures(row: Row, result: Evaluation) -> tuple[str, ...]:
    """Cells after the verdict."""
    low, high = result.intervals["kl_mean"]
    nbytes = sum(file.stat().st_size for file in row.folder.glob("*.safetensors"))
    return (
        f"{result.quantized_perplexity:.3f}",
        f"{result.perplexity_ratio:.4f}",
        f"{result.kl_mean:.5f}",
        f"{low:.5f}–{high:.5f}",
        f"{row.seconds:.0f}",
        size(row.peak),
        size(nbytes),
    )


def reference(source: Source, windows: list[Tensor], python: Path, place: Path) -> Iterator[Row]:
    """The tool's outputs, without the prediction layer that it was given."""
    model = place / "model"
    model.mkdir(mode=0o750)
    give(source.checkpoint, model)
    tokenizer = Tokenizer.from_file(str(source.checkpoint.folder / "tokenizer.json"))
    texts = [tokenizer.decode(ids[0].tolist()) for ids in windows]
    calib, practice = place / "calib.json", place / "practice.yaml"
    calib.write_text(json.dumps(texts), encoding="utf-8")
    (installed,) = python.parent.parent.glob("lib/python*/site-packages/msmodelslim")
    practice.write_text((installed / PRACTICE).read_text("utf-8").replace("mix_calib.jsonl", str(calib)), "utf-8")
    for file in (calib, practice):
        file.chmod(0o640)  # the tool refuses files that others may write
    out, script = place / "reference", place / "reference_w4a8"
    command = [python, HERE / "reference_driver.py", "quant", "--model_type", MODEL_TYPE, "--model_path", model]
    command += ["--save_path", out, "--device", "cpu", "--config_path", practice, "--trust_remote_code", "True"]
    measured = timed(command, place / "reference.log")
    drop_layer(out, source.config.num_hidden_layers)
    yield Row("msmodelslim 26.1.0, deepseek_w4a8_per_channel.yaml", out, *measured)
    measured = timed([python, HERE / "reference_w4a8.py", model, script, calib], place / "script.log")
    shutil.copyfile(source.checkpoint.folder / "config.json", script / "config.json")
    yield Row("msmodelslim 26.1.0, settings of the W4A8 script", script, *measured)


def ours(source: Source, windows: list[Tensor], policy: str, place: Path) -> Row:
    """Our output for the first of `TARGETS` that takes the policy."""
    ids = place / "ids.safetensors"
    width = min(window.shape[1] for window in windows)
    save_file({"ids": torch.cat([window[:, :width] for window in windows])}, ids)
    out = place / policy
    for target in TARGETS:
        command = [sys.executable, "-m", "fxquant", "compile", source.path, "--policy", policy, "--target", target]
        command += ["--calib", ids, "-o", out, "--no-verify", "--no-export", "--quiet"]
        try:
            seconds, peak = timed(command, place / f"{policy}.log")
        except subprocess.CalledProcessError:  # refused: the next one
            continue
        return Row(f"fxquant, {policy} for {target}", out, seconds, peak)
    raise SystemExit((place / f"{policy}.log").read_text())


def timed(command: list[Any], log: Path) -> tuple[float, int]:
    """Run it on one thread: seconds, and bytes of memory at the peak. Raises CalledProcessError."""
    start = time.perf_counter()
    with log.open("wb") as file:
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=subprocess.STDOUT, env=variables)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        print(f"{log.stem}: exit code {process.returncode}: {log.read_text(encoding='utf-8')[-200:]}", file=sys.stderr)
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def give(checkpoint: Checkpoint, model: Path) -> None:
    """The checkpoint as the tool wants it: an index, the model's code, and a prediction layer."""
    for file in checkpoint.folder.glob("*.json"):
        if file.name != "config.json" and not file.name.endswith(".index.json"):
            shutil.copyfile(file, model / file.name)
    shutil.copyfile(HERE / "reference_model.py", model / "reference_model.py")
    code = {"auto_map": {"AutoModelForCausalLM": "reference_model.ForCausalLM"}, "rope_interleave": True}
    (model / "config.json").write_text(json.dumps(checkpoint.config | code), encoding="utf-8")
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    layer, hidden = checkpoint.config["num_hidden_layers"], checkpoint.config["hidden_size"]
    last, path = f"model.layers.{layer - 1}.", f"model.layers.{layer}."
    extra = {path + name.removeprefix(last): tensor for name, tensor in tensors.items() if name.startswith(last)}
    unit = torch.ones(hidden, dtype=checkpoint.dtype)
    own = {"enorm.weight": unit, "hnorm.weight": unit, "shared_head.norm.weight": unit}
    own |= {"eh_proj.weight": torch.eye(hidden, dtype=checkpoint.dtype).repeat(1, 2)}
    own |= {"embed_tokens.weight": tensors["model.embed_tokens.weight"]}
    own |= {"shared_head.head.weight": tensors["lm_head.weight"]}
    extra |= {f"{prefix}{name}": tensor for prefix in (path, "model.layers.61.") for name, tensor in own.items()}
    weight_map = {}
    for part, group in ((1, tensors), (163, extra)):
        file = model / SHARD.format(part)
        save_file({name: tensor.clone() for name, tensor in group.items()}, file, {"format": "pt"})
        weight_map |= dict.fromkeys(group, file.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def drop_layer(out: Path, layer: int) -> None:
    """Take the prediction layer out of weights, description and index."""
    prefix = f"model.layers.{layer}."
    for file in out.glob("*.safetensors"):
        kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(prefix)}
        save_file(kept, file)
    for file in (*out.glob("quant_model_description*.json"), *out.glob("*.index.json")):
        document = json.loads(file.read_text(encoding="utf-8"))
        entries = document.get("weight_map", document)
        for name in [name for name in entries if name.startswith(prefix)]:
            del entries[name]
        file.write_text(json.dumps(document), encoding="utf-8")


def open_row(row: Row, source: Source) -> tuple[Program, Read, ForeignWeights]:
    """The output's integers in the model's graph, whoever wrote them."""
    found = find_folder(row.folder, "quant_model_description.json")
    result = found_program(found, source)
    if result.program is None:
        raise SystemExit(f"{row.folder}: {result.faults[0]}")
    engine = next(ENGINES[target] for target in TARGETS if result.read_by(ENGINES[target]))
    program = result.in_form_of(engine)
    weights = ForeignWeights(found, source.checkpoint, program, result.original, lambda *_, **__: None)
    return program, Cached(found.read), weights


def by_layer(weights: ForeignWeights) -> Iterator[tuple[int, float]]:
    """Layer → squared error of its quantized weights, relative to their squares."""
    sums: dict[int, list[float]] = {}
    for recipe in weights.program.recipes.values():
        layer = int(recipe.module.split(".")[2])
        for name in recipe.weight_names:
            error, squares = weights.squared_error(name)
            total = sums.setdefault(layer, [0.0, 0.0])
            total[0], total[1] = total[0] + error, total[1] + squares
    yield from ((layer, error / squares) for layer, (error, squares) in sorted(sums.items()))


if __name__ == "__main__":
    sys.exit(main())
