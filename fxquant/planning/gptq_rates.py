"""GPTQ in the host benchmark: its work in units that rates are given in, and calls to time. Imports torch."""

from collections.abc import Callable, Iterator

import torch

from fxquant.kernels.gptq import BLOCK, carry_matrix, feedback_codes

SHAPE = (512, 1024)
"""Rows and columns of the weight that GPTQ is timed on."""


def inverse_work(k: int) -> int:
    """Units of `GPTQ_INVERSE` per matrix [k, k]."""
    return k**3


def feedback_work(n: int, k: int) -> int:
    """Units of `GPTQ_FEEDBACK` per weight [n, k]: a column's error is carried into half of the others on average."""
    return n * k * (k + BLOCK)


def gptq_calls() -> Iterator[tuple[int, Callable[[], object]]]:
    """Units of work and a call that does them on one core: the inverse, then the feedback."""
    torch.set_num_threads(1)
    (n, k), generator = SHAPE, torch.Generator().manual_seed(0)
    inputs = torch.randn(k, k, generator=generator, dtype=torch.float64)
    hessian, weight = inputs.T @ inputs, torch.randn(n, k, generator=generator)
    steps, limit = torch.full_like(weight, 0.5), torch.full_like(weight, 7)
    yield inverse_work(k), lambda: carry_matrix(hessian)
    carry = carry_matrix(hessian)
    yield feedback_work(n, k), lambda: feedback_codes(weight, steps, -limit, limit, carry)
