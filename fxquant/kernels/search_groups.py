"""Scale search of two-level int4 groups: both scales, the least squared error. Needs numpy and numba only."""

from math import gcd

import numpy as np

from fxquant.kernels.int4 import INT4_MAXIMUM, TWO_LEVEL_MAXIMUM
from fxquant.kernels.rounding import MAGNITUDE, bits_of, float_of, kernel, round_run
from fxquant.kernels.squared_error import products, squared_error

GRID, GRID_STEPS = 8, 24
"""First-level scales of the grid: `(1 - i / 24) s` for i < 8; second scales clip further."""
ROUNDS = 6
"""Maximum least-squares iterations per start."""
LARGEST_SECOND = TWO_LEVEL_MAXIMUM // INT4_MAXIMUM


@kernel
def lowest_code(second: np.float32) -> int:
    """-8, or the lowest code that keeps `q4 * second` within 119."""
    return -min(INT4_MAXIMUM + 1, TWO_LEVEL_MAXIMUM // int(second))


@kernel
def group_peaks(values: np.ndarray, peaks: np.ndarray) -> None:
    """Largest magnitude of each group, float32 [k] → float32 [G]."""
    width = values.shape[0] // peaks.shape[0]
    for g in range(peaks.shape[0]):
        group, largest = values[g * width : (g + 1) * width], np.uint32(0)
        for j in range(width):
            largest = np.uint32(max(largest, np.uint32(bits_of(group[j]) & MAGNITUDE)))
        peaks[g] = float_of(largest)


@kernel
def choose_seconds(
    values: np.ndarray, scale: np.float32, peaks: np.ndarray, limit: np.float64, second: np.ndarray, lanes: np.ndarray
) -> np.float64:
    """The best second scale of each group for `scale` > 0. Returns the row's error, or a partial sum above `limit`.

    Candidates, from the largest: the least m of 1 … 17 that clips no weight of the group (17 if all clip), to half.
    """
    width, total = values.shape[0] // peaks.shape[0], np.float64(0)
    for g in range(peaks.shape[0]):
        group, least = values[g * width : (g + 1) * width], np.float64(np.inf)
        needed = np.ceil(peaks[g] / (np.float32(INT4_MAXIMUM) * scale))
        widest = int(min(max(needed, np.float32(1)), np.float32(LARGEST_SECOND)))
        for factor in range(widest, (widest - 1) // 2, -1):
            step = np.float64(scale) * factor
            error = squared_error(group, step, lowest_code(np.float32(factor)), INT4_MAXIMUM, lanes)
            if error < least:
                least, second[g] = error, np.float32(factor)
        total += least
        if total > limit:  # already worse than the best scale: the other groups cannot matter
            return total
    return total


@kernel
def fitted_scale(values: np.ndarray, scale: np.float32, second: np.ndarray, lanes: np.ndarray) -> np.float32:
    """`<W, q s2> / <q s2, q s2>` with the codes q of these scales; 0 where all codes are 0."""
    width, dot, norm = values.shape[0] // second.shape[0], np.float64(0), np.float64(0)
    for g in range(second.shape[0]):
        factor = np.float64(second[g])
        step = np.float64(scale) * factor
        group = values[g * width : (g + 1) * width]
        part, square = products(group, step, lowest_code(second[g]), INT4_MAXIMUM, lanes)
        dot += factor * part
        norm += factor * factor * square
    return np.float32(dot / norm) if norm > 0 else np.float32(0)


@kernel
def two_level_scales(
    values: np.ndarray, scale: np.float32, least_squares: bool, second: np.ndarray, room: np.ndarray, lanes: np.ndarray
) -> np.float32:
    """A row, float32 [k] → its first-level scale, and `second` float32 [G]; `scale` > 0 is the largest tried.

    First the grid, ties to the larger scale. Then, for least squares, `fitted_scale` and `choose_seconds` alternate,
    starting from the largest scale, the best and its neighbors.
    room  float32 [2, G], scratch
    """
    peaks, tried_second = room[0], room[1]
    group_peaks(values, peaks)
    best, place = scale, 0
    least = choose_seconds(values, scale, peaks, np.inf, second, lanes)
    for i in range(1, GRID):
        tried = scale * np.float32((GRID_STEPS - i) / GRID_STEPS)
        if tried > 0:
            error = choose_seconds(values, tried, peaks, least, tried_second, lanes)
            if error < least:
                best, least, place = tried, error, i
                second[:] = tried_second
    if not least_squares:
        return best
    for offset in range(-2, 2):  # -2: the largest scale; -1 to 1: the best and its neighbors
        start = 0 if offset == -2 else place + offset
        if offset > -2 and not 0 < start < GRID:
            continue
        tried = scale * np.float32((GRID_STEPS - start) / GRID_STEPS)
        if tried > 0:
            choose_seconds(values, tried, peaks, np.inf, tried_second, lanes)
        for _ in range(ROUNDS):
            fitted = fitted_scale(values, tried, tried_second, lanes) if tried > 0 else np.float32(0)
            if fitted == tried or not fitted > 0:
                break
            tried = fitted
            error = choose_seconds(values, tried, peaks, np.inf, tried_second, lanes)
            if error < least:
                best, least = tried, error
                second[:] = tried_second
    return best


@kernel
def code_groups(values: np.ndarray, scale: np.float32, second: np.ndarray, codes: np.ndarray, sums: np.ndarray) -> None:
    """A row, float32 [k] → codes int8 [k], `clamp(rne(W / (s s2)), max(-8, -119 / s2), 7)`, sums of `q4 * second`."""
    group, chunk = values.shape[0] // second.shape[0], values.shape[0] // sums.shape[0]
    sums[:] = 0
    width = gcd(group, chunk)
    for start in range(0, values.shape[0], width):
        run, factor = slice(start, start + width), second[start // group]
        total = round_run(values[run], scale * factor, lowest_code(factor), INT4_MAXIMUM, codes[run])
        sums[start // chunk] += total * np.int32(factor)
