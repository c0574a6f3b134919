"""The scale of an output channel with the least squared error. Needs numpy and numba only."""

import numpy as np

from fxquant.kernels.rounding import kernel, scale_in
from fxquant.kernels.squared_error import products, squared_error

GRID, GRID_STEPS = 40, 64
"""Scales of the grid: `(1 - i / 64) s`, i below 40, from s down to 0.39 s."""
ROUNDS = 20
"""Of least squares, from each start."""


@kernel
def clip_scale(
    values: np.ndarray, scale: np.float32, dtype: int, low: int, high: int, lanes: np.ndarray
) -> tuple[np.float32, np.float64, int]:
    """Scale of the grid, rounded to `dtype`, its error, its place; `scale` > 0 is the first. Ties: the larger one."""
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
    """The best that was seen on the grid, and on the way from some of its scales by `s = <W, q> / <q, q>`.

    Starts are the largest scale, the best and its neighbors. A scale that its own codes ask for ends the way.
    """
    best, least, place = clip_scale(values, scale, dtype, low, high, lanes)
    for offset in range(-2, 2):
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
