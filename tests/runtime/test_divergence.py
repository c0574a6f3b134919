"""Divergence of logits against its formula, token by token."""

import math

import torch

from fxquant.runtime.divergence import Divergence, divergence


def test_figures_are_those_of_the_formula() -> None:
    run, graph = (torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    kls, agree = [], 0
    for mine, other in zip(run.flatten(0, 1).tolist(), graph.flatten(0, 1).tolist(), strict=True):
        p, q = ([math.exp(logit) / sum(map(math.exp, logits)) for logit in logits] for logits in (mine, other))
        kls.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        agree += mine.index(max(mine)) == other.index(max(other))
    found = divergence(run, graph)
    # sums of seven products of doubles
    assert math.isclose(found.kl_mean, sum(kls) / 10, rel_tol=1e-13) and math.isclose(
        found.kl_max, max(kls), rel_tol=1e-13
    )
    assert (found.tokens, found.top1_agreement) == (10, agree / 10)
    assert found.logit == float((run.double() - graph.double()).abs().max())


def test_equal_logits_do_not_diverge() -> None:
    logits = torch.randn(3, 1, 50, generator=torch.Generator().manual_seed(0))
    assert divergence(logits, logits.clone()) == Divergence(3, 0.0, 0.0, 1.0, 0.0)


def test_a_logit_more_on_all_changes_no_probability() -> None:
    logits = torch.arange(6.0).view(1, 6)
    found = divergence(logits + 4, logits)
    assert found.logit == 4 and found.kl_max < 1e-15
