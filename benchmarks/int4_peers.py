"""Four-bit experts beside those of others, on the same weights and text.

python benchmarks/int4_peers.py text MODEL --text FILE --calib FILE
    KL of the model with int4 experts alone: ours, with int8 activations, and torchao's int4 groups (pip install
    torchao), whose activations stay float here.
python benchmarks/int4_peers.py weights MODEL OUT
    Squared weight error of least squares, one scale a channel, beside that of OUT, an output of the reference quantizer
    with one scale a channel: matrix by matrix.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import prepare
from fxquant.evaluation.divergence import evaluate_programs
from fxquant.frontend.source import open_source
from fxquant.kernels.module_tensors import rounded_weight
from fxquant.ops.quantized import expand_int4
from fxquant.policy.policy import load_policy
from fxquant.runtime.weight_providers import Cached, Read, RecipeWeights
from fxquant.schemes.schemes import Recipe, Scheme, WeightAlgorithm
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.safetensors import read_header
from fxquant.text.load import load_batches
from fxquant.tools.console import console, errors
from fxquant.tools.stages import reporter

GROUP_SIZE = 128
EXPERTS = """
unseen_experts: all_tokens
rules:
  - {{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: {size}, algorithm: {algorithm}}}
  - {{kind: mtp, scheme: LEAVE_OUT, optional: true}}
  - {{path: "*", scheme: FLOAT}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    text = verbs.add_parser("text")
    text.add_argument("model", type=Path)
    text.add_argument("--text", type=Path, required=True)
    text.add_argument("--calib", type=Path)
    text.add_argument("--samples", type=int, default=64)
    weights = verbs.add_parser("weights")
    weights.add_argument("model", type=Path)
    weights.add_argument("output", type=Path)
    options = parser.parse_args()
    compare_text(options) if options.verb == "text" else compare_weights(options.model, options.output)


def compare_text(options: argparse.Namespace) -> None:
    source, report = open_source(options.model), reporter(quiet=not errors.is_terminal)
    batches = load_batches(options.text, source.checkpoint, options.samples, 256)
    program, compiled = source.program(), CompileOptions(calib=options.calib)
    experts = {name for parameter in program.parameters.values() if parameter.stacked for name in parameter.names}
    rows = {"torchao, groups of 128, float activations": (program, Cached(torchao_experts(source.checkpoint, experts)))}
    with tempfile.TemporaryDirectory() as folder:
        for algorithm in WeightAlgorithm:
            path = Path(folder) / f"{algorithm}.yaml"
            path.write_text(EXPERTS.format(size=GROUP_SIZE, algorithm=algorithm))
            prepared = prepare(source, load_policy(str(path)), compiled, report, for_engine=False)
            read = RecipeWeights(prepared.program, prepared.checkpoint, prepared.solved)
            rows[f"fxquant {algorithm}, groups of 128, int8 activations"] = (prepared.program, Cached(read))
    evaluations = evaluate_programs((program, Cached(source.checkpoint.read)), list(rows.values()), batches, report)
    table = Table(title=f"int4 experts alone, {options.model.name} on {options.text.name}", title_justify="left")
    for heading in ("experts", "/ float", "KL per token", "95 %"):
        table.add_column(heading)
    for label, evaluation in zip(rows, evaluations, strict=True):
        low, high = evaluation.intervals["kl_mean"]
        table.add_row(label, f"{evaluation.perplexity_ratio:.5f}", f"{evaluation.kl_mean:.5f}", f"{low:.5f}–{high:.5f}")
    console.print(table)


def torchao_experts(checkpoint: Checkpoint, experts: set[str]) -> Read:
    """The checkpoint with its experts as torchao's symmetric int4 of groups stand for."""
    from torchao.quantization.quant_primitives import (
        MappingType,
        choose_qparams_affine,
        dequantize_affine,
        quantize_affine,
    )

    block, ends = (1, GROUP_SIZE), (torch.int8, -8, 7)

    def read(name: str) -> Tensor:
        weight = checkpoint.read(name)
        if name not in experts:
            return weight
        scale, zero = choose_qparams_affine(weight, MappingType.SYMMETRIC, block, *ends, scale_dtype=weight.dtype)
        codes = quantize_affine(weight, block, scale, zero, *ends)
        return dequantize_affine(codes, block, scale, zero, *ends, output_dtype=torch.float32)

    return read


def compare_weights(model: Path, output: Path) -> None:
    checkpoint = open_checkpoint(model)
    infos = {name: info for file in sorted(output.glob("*.safetensors")) for name, info in read_header(file).items()}
    table, worse, ratios = Table("matrix", "reference", "least squares", "ratio"), 0, []
    for module, theirs in stored_int4(infos):
        weight = checkpoint.read(f"{module}.weight")
        n, k = weight.shape
        recipe = Recipe(
            module, (module,), Scheme.W4A8_DYNAMIC, 0, n, k, False, False, weight.dtype,
            weight_format=WeightFormat.PER_CHANNEL, scale_dtype=weight.dtype, algorithm=WeightAlgorithm.LEAST_SQUARES,
        )  # fmt: skip
        wide = weight.float()
        other, ours = (
            float((rounded - wide).square().sum() / wide.square().sum())
            for rounded in (theirs, rounded_weight(recipe, weight))
        )
        ratios.append(ours / other)
        worse += ours > other
        table.add_row(module, f"{other:.6f}", f"{ours:.6f}", f"{ours / other:.4f}")
    console.print(table)
    console.print(
        f"{len(ratios)} matrices, worse than the reference in {worse}, ratio {min(ratios):.4f} … {max(ratios):.4f}"
    )


def stored_int4(infos: dict) -> Iterator[tuple[str, Tensor]]:
    """Module and float32 [n, k] of every packed int4 weight."""
    for name in sorted(infos):
        module = name.removesuffix(".scale_bias")
        if module != name:
            codes = expand_int4(infos[f"{module}.weight"].read(), None)
            yield module, codes * infos[f"{module}.weight_scale"].read().float()


if __name__ == "__main__":
    main()
