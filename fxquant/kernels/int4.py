"""Int4 weights: one scale per output channel, or also an integer scale per group. Needs numpy and numba only."""

from math import gcd

import numpy as np

from fxquant.kernels.decode import EncodedRows, decode_row
from fxquant.kernels.rounding import BFLOAT16, INFINITY, kernel, round_run, row_scale

INT4_MAXIMUM = 7
TWO_LEVEL_MAXIMUM = INT4_MAXIMUM * 17
"""119: with integer group scales up to 17, `q4 * second` of the two-level form stays within int8."""


@kernel
def first_level(values: np.ndarray, divisor: np.float32, codes: np.ndarray) -> np.int32:
    """A group, float32 → int8 `clamp(rne(W / s), -119, 119)`; returns the largest magnitude of these.

    The clamp only matters for subnormal scales, whose rounding is coarse.
    """
    limit, largest = np.float32(TWO_LEVEL_MAXIMUM), np.int32(0)
    for j in range(values.shape[0]):
        code = np.int32(np.rint(min(max(values[j] / divisor, -limit), limit)))
        codes[j] = code
        largest = np.int32(max(largest, np.int32(abs(code))))
    return largest


@kernel
def second_level(first: np.ndarray, second: np.float32, codes: np.ndarray) -> np.int32:
    """Part of a group, int8 → int8 `clamp(rne(q8 / second), -8, 7)`; returns the sum of these."""
    total = np.int32(0)
    for j in range(first.shape[0]):
        code = np.int32(min(max(np.rint(np.float32(first[j]) / second), np.float32(-8)), np.float32(7)))
        codes[j] = code
        total = np.int32(total + code)
    return total


@kernel
def two_level(
    values: np.ndarray, scale: np.float32, first: np.ndarray, codes: np.ndarray, second: np.ndarray, sums: np.ndarray
) -> None:
    """A row, float32 [k] → codes int8 [k], second float32 [G] of integers 1 … 17, sums of `q4 * second` [chunks].

    second = max(1, rne(max|q8| over the group / 7)). Inner loops cover gcd(group, chunk) columns, within one group and
    one chunk.
    """
    divisor = scale if scale > 0 else np.float32(1)
    group, chunk = first.shape[0] // second.shape[0], first.shape[0] // sums.shape[0]
    for g in range(second.shape[0]):
        run = slice(g * group, (g + 1) * group)
        largest = first_level(values[run], divisor, first[run])
        second[g] = max(np.float32(1), np.rint(np.float32(largest) / np.float32(INT4_MAXIMUM)))
    sums[:] = 0
    width = gcd(group, chunk)
    for start in range(0, first.shape[0], width):
        run = slice(start, start + width)
        factor = second[start // group]
        sums[start // chunk] += second_level(first[run], factor, codes[run]) * np.int32(factor)


@kernel
def per_channel(values: np.ndarray, scale: np.float32, codes: np.ndarray, sums: np.ndarray) -> None:
    """A row, float32 [k] → codes int8 [k], `clamp(rne(W / s), -8, 7)`, and sums of codes int32 [chunks]."""
    chunk = values.shape[0] // sums.shape[0]
    for c in range(sums.shape[0]):
        run = slice(c * chunk, (c + 1) * chunk)
        sums[c] = round_run(values[run], scale, -8, 7, codes[run])


@kernel
def pack_rows(even: np.ndarray, odd: np.ndarray, packed: np.ndarray) -> None:
    """Two rows int8 [k] → one row of bytes, the even row in the low nibble."""
    for j in range(packed.shape[0]):
        packed[j] = (even[j] & np.int8(15)) | (odd[j] << np.int8(4))


@kernel
def int4_rows(
    rows: EncodedRows, scale_dtype: int, codes: np.ndarray, scale: np.ndarray, second: np.ndarray, bias: np.ndarray
) -> int:
    """Rows [n, k] → the tensors of an int4 linear. Returns the first row that is not finite, or -1.

    codes   int8 [n / 2, k], two rows per byte, n even; or [n, k], one code per byte
    scale   float32 [n]: `max|W| / 119`, or without second scales `max|W| / 7` rounded to `scale_dtype`
    second  float32 [n, G], or [n, 0] for one scale per channel
    bias    float32 [n, chunks], `8 * scale * sum of q4 * second` over each of the equal chunks of k; or [n, 0]
    A progressive scheme as in QServe (Lin et al. 2024, arXiv:2405.04532). With second scales, `bias` is computed from
    `scale` rounded to bfloat16; the sum is exact.
    """
    n, k, packed, grouped = scale.shape[0], codes.shape[1], codes.shape[0] < scale.shape[0], second.shape[1] > 0
    values, first, pair = np.empty(k, np.float32), np.empty(k, np.int8), np.empty((2, k), np.int8)
    sums = np.empty(max(bias.shape[1], 1), np.int32)
    for i in range(n):
        largest = decode_row(rows, i, values)
        if largest >= INFINITY:
            return i
        scale[i] = exact = row_scale(largest, TWO_LEVEL_MAXIMUM if grouped else INT4_MAXIMUM, scale_dtype)
        row = pair[i & 1] if packed else codes[i]
        if grouped:
            two_level(values, exact, first, row, second[i], sums)
            # as in the engines' reference, only the bias uses bfloat16(s); codes and the stored scale use s
            exact = row_scale(largest, TWO_LEVEL_MAXIMUM, BFLOAT16)
        else:
            per_channel(values, exact, row, sums)
        for c in range(bias.shape[1]):
            # in float64 the product is exact, so storing it is the only rounding
            bias[i, c] = 8 * np.float64(exact) * sums[c]
        if packed and i & 1:
            pack_rows(pair[0], pair[1], codes[i >> 1])
    return -1
