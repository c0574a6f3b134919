"""Perplexity and KL divergence of a rewritten graph against the float graph."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.execute import execute, prefill_inputs
from fxquant.program import Program
from fxquant.progress import Reporter, silent
from fxquant.weights import Read

CHUNK = 8
"""Batches run together: their logits are in memory at once, and each weight is read once a chunk."""


@dataclass(frozen=True)
class Evaluation:
    """Means over all scored tokens; KL(float ‖ quantized) in nats a token."""

    float_perplexity: float
    quantized_perplexity: float
    kl_mean: float
    top1_agreement: float
    tokens: int

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "float": {"perplexity": self.float_perplexity},
            "quantized": {"perplexity": self.quantized_perplexity},
            "kl_mean": self.kl_mean,
            "top1_agreement": self.top1_agreement,
            "tokens": self.tokens,
        }


def evaluate_programs(
    original: tuple[Program, Read],
    quantized: Sequence[tuple[Program, Read]],
    batches: list[Tensor],
    report: Reporter = silent,
) -> list[Evaluation]:
    """Score every next token of `batches` (int64 [1, length]) under the float program and each of the others."""
    sums, tokens = torch.zeros(len(quantized), 4, dtype=torch.float64), 0
    with report("evaluate", len(batches) * len(quantized), "batches") as advance:
        for start in range(0, len(batches), CHUNK):
            chunk = batches[start : start + CHUNK]
            expected = _log_probabilities(*original, chunk)
            for index, program in enumerate(quantized):
                for ids, p, q in zip(chunk, expected, _log_probabilities(*program, chunk), strict=True):
                    sums[index] += _scores(ids, p, q)
                advance(len(chunk))
            tokens += sum(ids.numel() - ids.shape[0] for ids in chunk)
    return [Evaluation(math.exp(one[0]), math.exp(one[1]), one[2], one[3], tokens) for one in (sums / tokens).tolist()]


def _log_probabilities(program: Program, read: Read, batches: list[Tensor]) -> list[Tensor]:
    outputs = execute(program, read, [prefill_inputs(program, ids) for ids in batches])
    return [output[0][:, :-1].double().log_softmax(-1) for output in outputs]


def _scores(ids: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Sums of -log p, -log q of the next token, of KL(p ‖ q), and of agreeing best tokens."""
    targets = ids[:, 1:, None]
    kl = (p.exp() * (p - q)).sum()
    agree = (p.argmax(-1) == q.argmax(-1)).sum()
    return torch.stack([-p.gather(-1, targets).sum(), -q.gather(-1, targets).sum(), kl, agree.double()])
