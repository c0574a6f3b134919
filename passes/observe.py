"""Running ranges of activations: one (minimum, maximum) a batch, combined as the policy says."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fxquant.policy import ActivationStatistic
from fxquant.schemes import ActivationRange


def combine(
    lows: Iterable[Tensor], highs: Iterable[Tensor], statistic: ActivationStatistic, dtype: torch.dtype
) -> ActivationRange:
    """One range from each batch's minimum and maximum (0-d float32, or one tensor [batches]).

    MIN_MAX: over all batches, arithmetic in float32. BATCH_MEAN: each rounded to the model's `dtype`, their mean and
    everything after it in that dtype, as the reference quantizer computes.
    """
    low, high = torch.stack(list(lows)), torch.stack(list(highs))
    if statistic is ActivationStatistic.BATCH_MEAN:
        return ActivationRange(low.to(dtype).mean().item(), high.to(dtype).mean().item(), dtype)
    return ActivationRange(low.min().item(), high.max().item())
