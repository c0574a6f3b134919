"""What calibration keeps of a linear's input, and how it becomes the one range of a static scheme."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fxquant.policy.policy import ActivationStatistic, Policy
from fxquant.schemes.schemes import ActivationRange

BINS = 2048
"""Of a histogram."""
CUTS = 48
"""Ends of a range that a search tries on each side: `(1 - i / 64)` of the extreme, i below 48."""
Extremes = tuple[list[Tensor], list[Tensor]]
"""Smallest and largest values, 0-d float32: one of each a batch, or one of each for all."""
Observer = Callable[[Sequence[Tensor]], Extremes]


def observer_of(policy: Policy) -> tuple[str, Observer]:
    """What the policy keeps of the values [tokens, k] of each batch, and the name under which a calibration has it."""
    if policy.activation_statistic is ActivationStatistic.PERCENTILE:
        percent = policy.percentile
        return f"percentile {percent:g}", lambda values: percentile_range(values, percent)
    if policy.activation_statistic is ActivationStatistic.HISTOGRAM:
        return "histogram", histogram_range
    return "extremes", extremes


def extremes(values: Sequence[Tensor]) -> Extremes:
    """Minimum and maximum of each batch."""
    return [value.min() for value in values], [value.max() for value in values]


def percentile_range(values: Sequence[Tensor], percent: float) -> Extremes:
    """Of all n values, in order, those at `ceil(n * percent / 100)` and as far from the start; no interpolation."""
    flat = torch.cat([value.flatten() for value in values])
    rank = max(1, min(len(flat), -int(-len(flat) * percent // 100)))
    return [-torch.kthvalue(-flat, rank).values], [torch.kthvalue(flat, rank).values]


def histogram_range(values: Sequence[Tensor]) -> Extremes:
    """The range whose int8 has the least mean squared error over a histogram of `BINS` equal bins.

    Ends are the extremes times `1 - i / 64`. A value counts as the middle of its bin; of equal errors the wider range
    wins. The range of a static scheme always has 0 in it.
    """
    lows, highs = extremes(values)
    low, high = min(0.0, torch.stack(lows).min().item()), max(0.0, torch.stack(highs).max().item())
    if low == high or not torch.isfinite(torch.tensor([low, high])).all():
        return lows, highs
    counts = torch.stack([torch.histc(value.float(), BINS, low, high) for value in values]).double().sum(0)
    middles = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((high - low) / BINS)
    cuts = 1 - torch.arange(CUTS, dtype=torch.float64) / 64
    errors = torch.stack([_errors(middles, counts, low * cut, high * cuts) for cut in cuts])
    i, j = divmod(int(errors.argmin()), CUTS)
    return [torch.tensor(low * cuts[i].item())], [torch.tensor(high * cuts[j].item())]


def _errors(middles: Tensor, counts: Tensor, low: Tensor, highs: Tensor) -> Tensor:
    """Of each range from `low` to one of `highs` [CUTS]: the sum of counts times squared errors, float64."""
    scale = ((highs - low) / 255).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    offset = torch.round(-low / scale) - 128
    codes = torch.round(middles / scale + offset).clamp(-128, 127)
    return (((codes - offset) * scale - middles).square() * counts).sum(1)


def combine(
    lows: Iterable[Tensor], highs: Iterable[Tensor], statistic: ActivationStatistic, dtype: torch.dtype
) -> ActivationRange:
    """One range from each batch's minimum and maximum (0-d float32, or one tensor [batches]).

    BATCH_MEAN: each rounded to the model's `dtype`, their mean and everything after it in that dtype, as the reference
    quantizer computes. Otherwise over all batches, arithmetic in float32.
    """
    low, high = torch.stack(list(lows)), torch.stack(list(highs))
    if statistic is ActivationStatistic.BATCH_MEAN:
        return ActivationRange(low.to(dtype).mean().item(), high.to(dtype).mean().item(), dtype)
    return ActivationRange(low.min().item(), high.max().item())
