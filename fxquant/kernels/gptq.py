"""GPTQ: integer codes that compensate each other's rounding errors on calibration inputs.

Frantar et al. 2022, arXiv:2210.17323. Scales are fixed; the rounding error of each column is propagated into the
columns that are not rounded yet, which keeps the outputs on these inputs close.
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Fraction of the mean diagonal of the Hessian that is added to its diagonal."""
BLOCK = 128
"""Columns per lazy update: all later columns are updated by one matrix product per block."""


def hessian(inputs: Tensor) -> Tensor:
    """inputs [tokens, k] → float64 [k, k], `X.T X / tokens`."""
    wide = inputs.double()
    return wide.T @ wide / max(1, len(inputs))


def carry_matrix(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Column order int64 [k], largest diagonal first, and in this order the upper Cholesky factor of the inverse of
    the damped Hessian, float32 [k, k]."""
    # columns with the largest inputs first (act-order): most others are then left to absorb their error;
    # stable, so that equal diagonals give the same codes everywhere
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order][:, order].clone()
    mean = damped.diagonal().mean()
    # with fewer tokens than columns, or a channel that is always 0, the Hessian is singular without damping
    damped.diagonal().add_(DAMPING * (mean if mean > 0 else 1.0))
    # in float64 up to here: the damped Hessian may still be too ill-conditioned for float32
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def feedback_codes(
    weight: Tensor, steps: Tensor, lowest: Tensor, highest: Tensor, carry: tuple[Tensor, Tensor]
) -> Tensor:
    """int8 [n, k], `clamp(rne(W / step), lowest, highest)` column by column, with errors propagated by `carry_matrix`.

    weight  float32 [n, k]
    steps   float32 [n, k]: the weight per unit of code; 0 gives code 0
    lowest, highest  float32 [n, k]: range of codes of the format
    """
    order, factor = carry
    left, steps, lowest, highest = (matrix.T[order].contiguous() for matrix in (weight, steps, lowest, highest))
    # [k, n]: the loop works on single columns of the weight, which are contiguous this way
    divisors, codes = torch.where(steps > 0, steps, 1.0), torch.empty_like(left)
    for start in range(0, len(order), BLOCK):
        end = min(start + BLOCK, len(order))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            code = (left[j] / divisors[j]).round_().clamp_(lowest[j], highest[j])
            codes[j] = torch.where(steps[j] > 0, code, 0.0)
            errors[j - start] = (left[j] - codes[j] * steps[j]) / factor[j, j]
            left[j:end] -= factor[j, j:end, None] * errors[j - start]
        left[end:] -= factor[start:end, end:].T @ errors
    ordered = torch.empty_like(codes)
    ordered[order] = codes
    return ordered.T.to(torch.int8).contiguous()
