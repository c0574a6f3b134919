"""Squared error of rounding weights with a step, and the step that fits their codes. Needs numpy and numba only.

Sums are float64, in an order that holds at any vector width: column j is added to lane j mod LANES, columns in order;
then the upper half of the lanes is added to the lower half until one is left.
"""

import numpy as np

from fxquant.kernels.rounding import kernel

LANES = 32


@kernel
def folded(lanes: np.ndarray) -> np.float64:
    """The sum of float64 [LANES]."""
    width = LANES >> 1
    while width:
        for lane in range(width):
            lanes[lane] += lanes[lane + width]
        width >>= 1
    return lanes[0]


@kernel
def squared_error(values: np.ndarray, step: np.float64, low: int, high: int, lanes: np.ndarray) -> np.float64:
    """`Σ (W - t q)²` over float32 [k], with `q = clamp(rne(W / float32(t)), low, high)`; t > 0.

    lanes  float64 [3, LANES], scratch
    """
    divisor, lowest, highest, sums = np.float32(step), np.float32(low), np.float32(high), lanes[0]
    for lane in range(LANES):
        sums[lane] = 0
    whole = values.shape[0] - values.shape[0] % LANES
    for start in range(0, whole, LANES):
        part = values[start : start + LANES]
        for lane in range(LANES):
            code = np.rint(min(max(part[lane] / divisor, lowest), highest))
            error = np.float64(part[lane]) - step * np.float64(code)
            sums[lane] += error * error
    rest = values[whole:]
    for lane in range(rest.shape[0]):
        code = np.rint(min(max(rest[lane] / divisor, lowest), highest))
        error = np.float64(rest[lane]) - step * np.float64(code)
        sums[lane] += error * error
    return folded(sums)


@kernel
def products(
    values: np.ndarray, step: np.float64, low: int, high: int, lanes: np.ndarray
) -> tuple[np.float64, np.float64]:
    """`<W, q>` and `<q, q>` with the codes of `squared_error`: their quotient is the step that fits these codes."""
    divisor, lowest, highest = np.float32(step), np.float32(low), np.float32(high)
    dots, norms = lanes[1], lanes[2]
    for lane in range(LANES):
        dots[lane] = norms[lane] = 0
    whole = values.shape[0] - values.shape[0] % LANES
    for start in range(0, whole, LANES):
        part = values[start : start + LANES]
        for lane in range(LANES):
            code = np.float64(np.rint(min(max(part[lane] / divisor, lowest), highest)))
            dots[lane] += np.float64(part[lane]) * code
            norms[lane] += code * code
    rest = values[whole:]
    for lane in range(rest.shape[0]):
        code = np.float64(np.rint(min(max(rest[lane] / divisor, lowest), highest)))
        dots[lane] += np.float64(rest[lane]) * code
        norms[lane] += code * code
    return folded(dots), folded(norms)
