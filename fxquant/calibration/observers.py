"""Observers: statistics of a linear's inputs, and their reduction to the range of a static scheme."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from fxquant.policy.policy import ActivationStatistic, Policy
from fxquant.schemes.schemes import ActivationRange

BINS = 2048
"""Bins of a histogram."""
CUTS = 48
"""Candidates on each side in the range search: `(1 - i / 64)` of the extreme for i < 48."""
Extremes = tuple[list[Tensor], list[Tensor]]
"""Smallest and largest values, 0-d float32: one of each per batch, or one of each for all batches."""
Observer = Callable[[Sequence[Tensor]], Extremes]


def observer_of(policy: Policy) -> tuple[str, Observer]:
    """The policy's observer of the values [tokens, k] of each batch, and its name in calibration files."""
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
    """Of all n sorted values, the one at rank `ceil(n * percent / 100)` from either end; no interpolation."""
    flat = torch.cat([value.flatten() for value in values])
    rank = max(1, min(len(flat), -int(-len(flat) * percent // 100)))
    return [-torch.kthvalue(-flat, rank).values], [torch.kthvalue(flat, rank).values]


def histogram_range(values: Sequence[Tensor]) -> Extremes:
    """The range with the least mean squared int8 error over a histogram of `BINS` equal bins.

    Ends are the extremes times `1 - i / 64`. A value counts as the middle of its bin; ties go to the wider range. The
    range of a static scheme always includes 0.
    """
    lows, highs = extremes(values)
    low, high = min(0.0, torch.stack(lows).min().item()), max(0.0, torch.stack(highs).max().item())
    if low == high or not torch.isfinite(torch.tensor([low, high])).all():
        return lows, highs
    # counts are summed in float64: float32 is exact up to 2**24 only
    counts = torch.stack([torch.histc(value.float(), BINS, low, high) for value in values]).double().sum(0)
    middles = low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((high - low) / BINS)
    cuts = 1 - torch.arange(CUTS, dtype=torch.float64) / 64
    errors = torch.stack([_errors(middles, counts, low * cut, high * cuts) for cut in cuts])
    i, j = divmod(int(errors.argmin()), CUTS)
    return [torch.tensor(low * cuts[i].item())], [torch.tensor(high * cuts[j].item())]


def _errors(middles: Tensor, counts: Tensor, low: Tensor, highs: Tensor) -> Tensor:
    """Sum of counts times squared errors for each range from `low` to one of `highs` [CUTS], float64."""
    scale = ((highs - low) / 255).clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(1)
    offset = torch.round(-low / scale) - 128
    codes = torch.round(middles / scale + offset).clamp(-128, 127)
    return (((codes - offset) * scale - middles).square() * counts).sum(1)


def combine(
    lows: Iterable[Tensor], highs: Iterable[Tensor], statistic: ActivationStatistic, dtype: torch.dtype
) -> ActivationRange:
    """One range from the minimum and maximum of each batch (0-d float32, or one tensor [batches]).

    BATCH_MEAN: each is rounded to the model's `dtype`; the mean and all later arithmetic are in that dtype, as in the
    reference quantizer. Otherwise the extremes over all batches, with arithmetic in float32.
    """
    low, high = torch.stack(list(lows)), torch.stack(list(highs))
    if statistic is ActivationStatistic.BATCH_MEAN:
        return ActivationRange(low.to(dtype).mean().item(), high.to(dtype).mean().item(), dtype)
    return ActivationRange(low.min().item(), high.max().item())
