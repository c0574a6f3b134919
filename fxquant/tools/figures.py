"""Figures of an evaluation as cells of a table."""

from typing import NamedTuple

from fxquant.evaluation.divergence import Evaluation


class Figure(NamedTuple):
    """Heading of its column, and format of its value."""

    heading: str
    form: str


FIGURES = {
    "quantized_perplexity": Figure("perplexity", ".4f"),
    "perplexity_ratio": Figure("/ float", ".5f"),
    "kl_mean": Figure("KL per token", ".5f"),
    "kl_p99": Figure("KL, 99th percentile", ".4f"),
    "top1_agreement": Figure("top-1 agreement", ".2%"),
}
"""Field of `Evaluation` → how it is shown, in order."""


def figures(result: Evaluation) -> list[str]:
    """All of them."""
    return [f"{getattr(result, name):{figure.form}}" for name, figure in FIGURES.items()]


def interval(result: Evaluation, name: str) -> str:
    """One interval, or nothing where a single document gives none."""
    return "–".join(f"{end:{FIGURES[name].form}}" for end in result.intervals.get(name, ()))


def intervals(result: Evaluation) -> list[str]:
    """Those of all figures."""
    return [interval(result, name) for name in FIGURES]
