"""Scale search of one output channel: the least squared error. Needs numpy and numba only."""

import numpy as np

from fxquant.kernels.rounding import kernel, scale_in
from fxquant.kernels.squared_error import products, squared_error

GRID, GRID_STEPS = 40, 64
"""Scales of the grid: `(1 - i / 64) s` for i < 40, from s down to 0.39 s."""
ROUNDS = 20
"""Maximum least-squares iterations per start."""


@kernel
def clip_scale(
    values: np.ndarray, scale: np.float32, dtype: int, low: int, high: int, lanes: np.ndarray
) -> tuple[np.float32, np.float64, int]:
    """The best scale of the grid, rounded to `dtype`, its error and index; starts at `scale` > 0. Ties: the larger."""
    best, least, place = scale, squared_error(values, np.float64(scale), low, high, lanes), 0
    for i in range(1, GRID):
        tried = scale_in(scale * np.float32((GRID_STEPS - i) / GRID_STEPS), dtype)
        if tried > 0:
            error = squared_error(values, np.float64(tried), low, high, lanes)
            if error < least:
                best, least, place = tried, error, i
    return best, least, place


@kernel
def least_squares_scale(
    values: np.ndarray, scale: np.float32, dtype: int, low: int, high: int, lanes: np.ndarray
) -> np.float32:
    """The best scale seen on the grid and in the iterations `s = <W, q> / <q, q>` from some of its scales.

    Starts are the largest scale, the best and its neighbors. An iteration ends at a fixed point.
    """
    best, least, place = clip_scale(values, scale, dtype, low, high, lanes)
    for offset in range(-2, 2):  # -2: the largest scale; -1 to 1: the best and its neighbors
        start = 0 if offset == -2 else place + offset
        if offset > -2 and not 0 < start < GRID:
            continue
        tried = scale_in(scale * np.float32((GRID_STEPS - start) / GRID_STEPS), dtype)
        for _ in range(ROUNDS):
            if not tried > 0:
                break
            dot, norm = products(values, np.float64(tried), low, high, lanes)
            fitted = scale_in(np.float32(dot / norm), dtype) if norm > 0 else np.float32(0)
            if fitted == tried or not fitted > 0:
                break
            tried = fitted
            error = squared_error(values, np.float64(tried), low, high, lanes)
            if error < least:
                best, least = tried, error
    return best
