"""Perplexity and KL divergence of a rewritten graph against the float graph, with confidence intervals."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.evaluation.bootstrap import Interval, draw_documents, drawn_percentile, middle
from fxquant.program.program import Program
from fxquant.progress import Reporter, silent
from fxquant.runtime.divergence import divergences
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import Read

CHUNK = 8
"""Batches run together: their logits are in memory at once, and each weight is read once per chunk."""
TAIL_PERCENT = 99


@dataclass(frozen=True)
class Evaluation:
    """Over all scored tokens; KL(float ‖ quantized) in nats per token.

    perplexity_ratio  quantized / float. Its interval is much narrower than those of the two: both read the same text
    kl_p99            the KL that 99 % of the tokens do not exceed
    kl_difference     `kl_mean` less that of the first program evaluated, token by token; None for the first
    intervals         field → its 95 % interval over documents; none for a single document
    """

    float_perplexity: float
    quantized_perplexity: float
    perplexity_ratio: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    tokens: int
    documents: int
    intervals: dict[str, Interval]
    kl_difference: float | None = None

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "float": {"perplexity": self.float_perplexity},
            "quantized": {"perplexity": self.quantized_perplexity},
            "perplexity_ratio": self.perplexity_ratio,
            "kl_mean": self.kl_mean,
            **({} if self.kl_difference is None else {"kl_difference": self.kl_difference}),
            "kl_p99": self.kl_p99,
            "top1_agreement": self.top1_agreement,
            "tokens": self.tokens,
            "documents": self.documents,
            "intervals": {name: list(interval) for name, interval in self.intervals.items()},
        }


def evaluate_programs(
    original: tuple[Program, Read],
    quantized: Sequence[tuple[Program, Read]],
    batches: list[Tensor],
    report: Reporter = silent,
    names: Sequence[str] = (),
) -> list[Evaluation]:
    """Score every next token of `batches`, documents int64 [1, length], under the float program and each quantized one.

    `names` of the quantized programs, for progress.
    """
    scores: list[list[Tensor]] = [[] for _ in quantized]
    with report("evaluate", len(batches) * len(quantized), "batches") as advance:
        for start in range(0, len(batches), CHUNK):
            chunk = batches[start : start + CHUNK]
            expected = logits(*original, chunk)
            for documents, program, name in zip(scores, quantized, names or [""] * len(quantized), strict=True):
                documents.extend(document_scores(chunk, expected, logits(*program, chunk)))
                advance(len(chunk), at=name)
    results: list[Evaluation] = []
    with report("intervals", len(scores), "graphs") as advance:
        for documents in scores:
            first = scores[0] if results else None
            results.append(summary(documents, first))
            advance(1)
    return results


def logits(program: Program, read: Read, batches: list[Tensor]) -> list[Tensor]:
    """float32 [1, length, vocabulary] of each of `batches`."""
    return [output[0] for output in execute(program, read, [prefill_inputs(program, ids) for ids in batches])]


def log_probabilities(scores: Tensor) -> Tensor:
    """float64 [1, length - 1, vocabulary] of the next token, from logits; the last position has no next token."""
    return scores[:, :-1].double().log_softmax(-1)


def document_scores(batches: list[Tensor], expected: list[Tensor], quantized: list[Tensor]) -> list[Tensor]:
    """`token_scores` of each document from its logits under both programs."""
    pairs = zip(batches, expected, quantized, strict=True)
    return [token_scores(ids, log_probabilities(p), log_probabilities(q)) for ids, p, q in pairs]


def token_scores(ids: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """float64 [4, tokens]: -log p and -log q of the next token, KL(p ‖ q), and whether the best tokens agree."""
    targets = ids[:, 1:, None]
    kl = divergences(p, q)
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    rows = [-p.gather(-1, targets)[..., 0], -q.gather(-1, targets)[..., 0], kl, agree]
    return torch.stack([row.flatten() for row in rows])


def summary(scores: list[Tensor], first: list[Tensor] | None = None) -> Evaluation:
    """All figures from the `token_scores` of each document; `first`: those of the program to take the difference to.

    The difference is paired: both programs read the same tokens, and each draw has the same documents of both, so what
    a document costs any program cancels.
    """
    tokens = torch.tensor([document.shape[1] for document in scores])
    counts = draw_documents(len(scores)) if len(scores) > 1 else None
    sums = torch.stack([document.sum(1) for document in scores])
    divergence = torch.cat([document[2] for document in scores])
    owners = torch.arange(len(scores)).repeat_interleave(tokens)
    once = torch.ones(1, len(scores), dtype=torch.float64)
    figures = _figures(once, tokens, sums, divergence, owners)
    drawn = _figures(counts, tokens, sums, divergence, owners) if counts is not None else {}
    if first is not None:
        more = sums[:, 2] - torch.stack([document[2].sum() for document in first])
        figures["kl_difference"] = _mean(once, tokens, more)
        drawn |= {"kl_difference": _mean(counts, tokens, more)} if counts is not None else {}
    return Evaluation(
        **{name: value.item() for name, value in figures.items()},
        tokens=int(tokens.sum()),
        documents=len(scores),
        intervals={name: middle(values) for name, values in drawn.items()},
    )


def _mean(counts: Tensor, tokens: Tensor, sums: Tensor) -> Tensor:
    """Mean over tokens [draws, …] of what sums to `sums` [documents, …] in each document."""
    means: Tensor = (counts @ sums) / (counts @ tokens.double()).view(-1, *[1] * (sums.dim() - 1))
    return means


def _figures(counts: Tensor, tokens: Tensor, sums: Tensor, divergence: Tensor, owners: Tensor) -> dict[str, Tensor]:
    """Each figure [draws], with documents weighted by `counts` [draws, documents]."""
    float_loss, quantized_loss, kl, agreement = _mean(counts, tokens, sums).unbind(1)
    return {
        "float_perplexity": float_loss.exp(),
        "quantized_perplexity": quantized_loss.exp(),
        "perplexity_ratio": (quantized_loss - float_loss).exp(),
        "kl_mean": kl,
        "kl_p99": drawn_percentile(divergence, owners, counts, TAIL_PERCENT),
        "top1_agreement": agreement,
    }
