"""Evaluation figures as table cells."""

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
    """The cells of all figures."""
    return [f"{getattr(result, name):{figure.form}}" for name, figure in FIGURES.items()]


def interval(result: Evaluation, name: str) -> str:
    """The cell of one interval; "" if a single document gives none."""
    return "–".join(f"{end:{FIGURES[name].form}}" for end in result.intervals.get(name, ()))


def difference(result: Evaluation) -> tuple[str, str, str]:
    """The cells of `kl_difference`: with its sign, its interval, and on which side of 0 that lies."""
    value = f"{result.kl_difference:+.5f}"
    if "kl_difference" not in result.intervals:
        return value, "", ""
    low, high = result.intervals["kl_difference"]
    verdict = "not distinguishable" if low <= 0 <= high else "less" if high < 0 else "more"
    return value, f"{low:+.5f} to {high:+.5f}", verdict


def intervals(result: Evaluation) -> list[str]:
    """The cells of all intervals."""
    return [interval(result, name) for name in FIGURES]
