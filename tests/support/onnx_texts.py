"""ONNX graphs of one model against its rewritten graph: greedy texts of many prompts, and KL over these texts."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from greedy_texts import Difference, GreedyTexts, best_tokens
from torch import Tensor

from fxquant import CompileOptions, compile, convert
from fxquant.api import open_output
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.generation.greedy import greedy
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.runtime.divergence import Divergence, divergence
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import Cached
from fxquant.text.load import load_batches
from fxquant.verification.noise import last_bit_noise

GRAPHS = {profile.value: OnnxOptions(onnx_profile=profile) for profile in OnnxProfile}
"""Name of a graph → how `convert` writes it."""
WEIGHTS = 1 << 30
"""Bytes of weights that the rewritten graph keeps from step to step."""
SHORTEST, LONGEST = 8, 40
"""Tokens of the prompts, which are of unequal lengths."""
SEEDS = 2


@dataclass(frozen=True)
class Compared:
    """A graph against the rewritten one.

    differences  the first of each text that has one, and how far last-bit noise moves a logit there
    distance     of its logits, over all prompts and the texts of the rewritten graph
    """

    texts: int
    differences: list[tuple[Difference, float]]
    distance: Divergence


def write_graphs(model: Path, policy: str, calib: Path | None, folder: Path) -> dict[str, Path]:
    """A folder for each of `GRAPHS`, of one set of integers."""
    first = folder / "compiled"
    compile(model, CompileOptions(policy=policy, target=Target.ONNX, calib=calib, out=first, verify=False))
    return {
        name: convert(first, Target.ONNX, folder / name, verify=False, onnx=options).out
        for name, options in GRAPHS.items()
    }


def greedy_texts(out: Path, text: Path, prompts: int, steps: int) -> GreedyTexts:
    """Of the rewritten graph of `out`, after the beginnings of the first documents of `text`."""
    program, read = open_output(out)
    documents = load_batches(text, Checkpoint(out, program.config, {}), prompts, LONGEST)
    lengths = [SHORTEST + (LONGEST - SHORTEST) * index // max(prompts - 1, 1) for index in range(len(documents))]
    ids = [document[0, :length].tolist() for document, length in zip(documents, lengths, strict=True)]
    return GreedyTexts(program, Cached(read, WEIGHTS), ids, steps)


def compare(out: Path, texts: GreedyTexts) -> Compared:
    """The ONNX graph of `out` against the rewritten graph of the same integers."""
    runner = OnnxRunner(out)
    own = best_tokens(greedy(runner, texts.prompts, texts.steps, texts.program.config["vocab_size"]))
    differences = [(difference, texts.noise(difference)) for difference in texts.differences(own)]
    pairs = zip(_whole(texts), _expected(texts), strict=True)
    return Compared(len(own), differences, together(divergence(runner.prefill(ids)[0], graph) for ids, graph in pairs))


def noise(texts: GreedyTexts) -> Divergence:
    """What last-bit noise does to the logits of the rewritten graph, over the same tokens."""
    inputs = [prefill_inputs(texts.program, ids) for ids in _whole(texts)]
    return together(last_bit_noise(texts.program, texts.read, each, SEEDS) for each in inputs)


def together(parts: Iterable[Divergence]) -> Divergence:
    """Over the tokens of all parts."""
    parts = list(parts)
    tokens = sum(part.tokens for part in parts)
    kl, top1 = (
        sum(getattr(part, name) * part.tokens for part in parts) / tokens for name in ("kl_mean", "top1_agreement")
    )
    return Divergence(tokens, kl, max(part.kl_max for part in parts), top1, max(part.logit for part in parts))


def _whole(texts: GreedyTexts) -> list[Tensor]:
    """int64 [1, length]: each prompt and the text after it."""
    return [torch.tensor([[*prompt, *new]]) for prompt, new in zip(texts.prompts, texts.tokens, strict=True)]


def _expected(texts: GreedyTexts) -> list[Tensor]:
    inputs = [prefill_inputs(texts.program, ids) for ids in _whole(texts)]
    return [logits for logits, *_ in execute(texts.program, texts.read, inputs)]
