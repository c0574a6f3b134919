"""Rounding of float32 values to bfloat16, float16, row scales and integers. Needs numpy and numba only.

Largest magnitudes are the unsigned integers `bits & 0x7fffffff`: they sort like the magnitudes, with infinity and NaN
at the top, at INFINITY or above.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from fxquant.kernels.cache import CachedCode


def kernel(function: Any) -> Any:
    """Compile with IEEE arithmetic as written (no fast-math), releasing the GIL.

    Functions of this package are cached for other processes, keyed by the sources of the package.
    """
    compiled: Any = njit(function, nogil=True, error_model="numpy", boundscheck=False)
    if function.__module__.startswith(f"{__package__}."):
        compiled._cache = CachedCode(function)
    return compiled


FLOAT32, BFLOAT16, FLOAT16, FLOAT8 = 0, 1, 2, 3
"""dtype codes of the kernels."""
SIGN, MAGNITUDE, INFINITY = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)
FLOAT16_NORMAL = np.uint32(0x38800000)
"""2**-14, the smallest normal float16."""
FLOAT16_OVERFLOW = np.uint32(0x47800000)
"""2**16: magnitudes beyond float16 round to this or more."""


def _float_of(context: Any, bits: Any) -> tuple[Any, Callable]:
    """uint32 bits → the float32 of these bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.uint32), generate


def _bits_of(context: Any, value: Any) -> tuple[Any, Callable]:
    """float32 → its bits as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(types.uint32))

    return types.uint32(types.float32), generate


float_of: Any = intrinsic(_float_of)
bits_of: Any = intrinsic(_bits_of)


@kernel
def to_bfloat16(magnitude: np.uint32) -> np.uint32:
    """Bits without sign → bits of the nearest bfloat16, ties to even; NaN becomes infinity."""
    last_bit = magnitude >> np.uint32(16) & np.uint32(1)  # added to 0x7fff it makes ties round to even
    rounded = np.uint32(magnitude + np.uint32(0x7FFF) + last_bit) & np.uint32(0xFFFF0000)
    return np.uint32(min(rounded, INFINITY))


@kernel
def to_float16(magnitude: np.uint32) -> np.uint32:
    """Bits without sign → float32 bits of the nearest float16, ties to even; overflow and NaN become infinity.

    Below 2**-14 float16 has a step of 2**-24, which is float32's step between 0.5 and 1: adding 0.5 rounds to it.
    """
    last_bit = magnitude >> np.uint32(13) & np.uint32(1)
    normal = np.uint32(magnitude + np.uint32(0xFFF) + last_bit) & np.uint32(0xFFFFE000)
    normal = normal if normal < FLOAT16_OVERFLOW else INFINITY
    half = np.float32(0.5)
    subnormal = bits_of(float_of(magnitude) + half - half)
    return np.uint32(normal if magnitude >= FLOAT16_NORMAL else subnormal)


@kernel
def round_row(values: np.ndarray, dtype: int) -> np.uint32:
    """Round float32 [k] in place to `dtype`; returns the largest magnitude."""
    largest = np.uint32(0)
    if dtype == BFLOAT16:
        for j in range(values.shape[0]):
            bits = bits_of(values[j])
            rounded = to_bfloat16(np.uint32(bits & MAGNITUDE))
            values[j] = float_of(np.uint32(rounded | np.uint32(bits & SIGN)))
            largest = np.uint32(max(largest, rounded))
    elif dtype == FLOAT16:
        for j in range(values.shape[0]):
            bits = bits_of(values[j])
            rounded = to_float16(np.uint32(bits & MAGNITUDE))
            values[j] = float_of(np.uint32(rounded | np.uint32(bits & SIGN)))
            largest = np.uint32(max(largest, rounded))
    else:
        for j in range(values.shape[0]):
            largest = np.uint32(max(largest, np.uint32(bits_of(values[j]) & MAGNITUDE)))
    return largest


@kernel
def row_scale(largest: np.uint32, maximum: int, dtype: int) -> np.float32:
    """`max|W| / maximum`, rounded to `dtype`."""
    return scale_in(float_of(largest) / np.float32(maximum), dtype)


@kernel
def scale_in(scale: np.float32, dtype: int) -> np.float32:
    """A non-negative scale, rounded to `dtype`."""
    if dtype == BFLOAT16:
        return float_of(to_bfloat16(bits_of(scale)))
    if dtype == FLOAT16:
        return float_of(to_float16(bits_of(scale)))
    return scale


@kernel
def round_run(values: np.ndarray, scale: np.float32, low: int, high: int, codes: np.ndarray) -> np.int32:
    """float32 [k] → int8 [k], `clamp(rne(W / s), low, high)`; returns the sum of these. A scale of 0 gives zeros.

    Callers pass slices, as LLVM vectorizes loops that start at 0. The format requires a division, not a product.
    """
    divisor = scale if scale > 0 else np.float32(1)
    lowest, highest, total = np.float32(low), np.float32(high), np.int32(0)
    for j in range(values.shape[0]):
        code = np.int32(np.rint(min(max(values[j] / divisor, lowest), highest)))
        codes[j] = code
        total = np.int32(total + code)
    return total
