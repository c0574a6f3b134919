"""Codes that make up for each other's rounding errors, on inputs that calibration saw: GPTQ.

Frantar et al. 2022, arXiv:2210.17323. Scales stand; what is left of a column's rounding error is carried into the
columns that are not rounded yet, so that the outputs on these inputs stay near.
"""

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it."""
BLOCK = 128
"""Columns between two updates of all later ones."""


def hessian(inputs: Tensor) -> Tensor:
    """inputs [tokens, k] → float64 [k, k], `X.T X / tokens`."""
    wide = inputs.double()
    return wide.T @ wide / max(1, len(inputs))


def carry_matrix(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """The order of columns, int64 [k], largest diagonal first, and in this order the upper Cholesky factor of the
    damped inverse, float32 [k, k]."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    damped = hessian[order][:, order].clone()
    mean = damped.diagonal().mean()
    damped.diagonal().add_(DAMPING * (mean if mean > 0 else 1.0))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True).float()


def feedback_codes(
    weight: Tensor, steps: Tensor, lowest: Tensor, highest: Tensor, carry: tuple[Tensor, Tensor]
) -> Tensor:
    """int8 [n, k], `clamp(rne(W / step), lowest, highest)` column by column, with errors carried on by `carry_matrix`.

    weight  float32 [n, k]
    steps   float32 [n, k]: what one of a code stands for; 0 leaves 0
    lowest, highest  float32 [n, k]: codes that the form can hold
    """
    order, factor = carry
    left, steps, lowest, highest = (one.T[order].contiguous() for one in (weight, steps, lowest, highest))  # [k, n]
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
    made = torch.empty_like(codes)
    made[order] = codes
    return made.T.to(torch.int8).contiguous()
