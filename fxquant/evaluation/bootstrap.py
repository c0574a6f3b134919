"""Bootstrap confidence intervals over documents: tokens of one document are not independent, documents are.

The percentile bootstrap: documents are drawn with replacement, as many as there are, and a statistic's interval spans
the middle 95 % of its values over all draws. Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
"""

import numpy as np
import torch
from torch import Tensor

DRAWS, LEVEL = 1000, 0.95

Interval = tuple[float, float]


def draw_documents(documents: int, draws: int = DRAWS) -> Tensor:
    """How often each document is in each draw, float64 [draws, documents]; the same in every call."""
    # multinomial: drawing with replacement, of which only the counts are needed
    return torch.from_numpy(
        np.random.default_rng(0).multinomial(documents, [1 / documents] * documents, draws)
    ).double()


def middle(values: Tensor) -> Interval:
    """The interval that holds the middle 95 % of `values` [draws]."""
    low, high = values.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=values.dtype)).tolist()
    return low, high


def drawn_percentile(values: Tensor, documents: Tensor, counts: Tensor, percent: int) -> Tensor:
    """The smallest value that at least `percent` of a draw's values do not exceed, [draws].

    values [tokens], documents int64 [tokens]: the document of each; counts [draws, documents], integers in float64, so
    that a share is compared without rounding.
    """
    order = values.argsort()
    ordered, owner = values[order], documents[order]
    places = [torch.searchsorted(100 * (sums := draw[owner].cumsum(0)), percent * sums[-1]) for draw in counts]
    return ordered[torch.stack(places)]
