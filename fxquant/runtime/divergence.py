"""Divergence of logits: how far those of a run are from a graph's, over the same tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

TOKENS = 16
"""Whose logits are widened at a time."""


@dataclass(frozen=True)
class Divergence:
    """Of a run from a graph, over `tokens` that both read.

    kl_mean, kl_max  KL(run ‖ graph) of the next token, in nats per token
    top1_agreement   part of the tokens after which both have the same best token
    logit            largest difference of a logit
    """

    tokens: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    logit: float


def divergence(run: Tensor, graph: Tensor) -> Divergence:
    """From logits [..., vocabulary] of equal shapes."""
    # rounding may leave the sum of equal distributions below zero
    pairs = zip(run.flatten(0, -2).split(TOKENS), graph.flatten(0, -2).split(TOKENS), strict=True)
    each = [divergences(own.double().log_softmax(-1), other.double().log_softmax(-1)) for own, other in pairs]
    kl = torch.cat(each).clamp(min=0)
    agree = (run.argmax(-1) == graph.argmax(-1)).double()
    pairs = zip(run.flatten(0, -2).split(TOKENS), graph.flatten(0, -2).split(TOKENS), strict=True)
    largest = max(float((own.double() - other.double()).abs().max()) for own, other in pairs)
    return Divergence(kl.numel(), float(kl.mean()), float(kl.max()), float(agree.mean()), largest)


def together(runs: Sequence[Divergence]) -> Divergence:
    """Of runs over as many tokens each."""
    means = (fmean(run.kl_mean for run in runs), max(run.kl_max for run in runs))
    agreement, logit = fmean(run.top1_agreement for run in runs), max(run.logit for run in runs)
    return Divergence(sum(run.tokens for run in runs), *means, agreement, logit)


def divergences(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats over the last axis, `Σ exp(p) (p - q)`, of log probabilities."""
    return (p.exp() * (p - q)).sum(-1)
