"""Rows → integers by scales of least squared error: `int8.py` and `int4.py` again. Needs numpy and numba only."""

import numpy as np

from fxquant.kernels.decode import EncodedRows, decode_row
from fxquant.kernels.int4 import INT4_MAXIMUM, TWO_LEVEL_MAXIMUM, pack_rows, per_channel
from fxquant.kernels.int8 import INT8_MAXIMUM
from fxquant.kernels.rounding import BFLOAT16, INFINITY, kernel, round_run, row_scale, scale_in
from fxquant.kernels.search_channel import clip_scale, least_squares_scale
from fxquant.kernels.search_groups import code_groups, two_level_scales
from fxquant.kernels.squared_error import LANES


@kernel
def searched_scale(
    values: np.ndarray, scale: np.float32, dtype: int, maximum: int, least_squares: bool, lanes: np.ndarray
) -> np.float32:
    """The scale of a channel of codes from `-maximum - 1` to `maximum`; that of a row of zeros stays 0."""
    if not scale > 0:
        return scale
    if least_squares:
        return least_squares_scale(values, scale, dtype, -maximum - 1, maximum, lanes)
    return clip_scale(values, scale, dtype, -maximum - 1, maximum, lanes)[0]


@kernel
def searched_int8_rows(
    rows: EncodedRows, scale_dtype: int, least_squares: bool, codes: np.ndarray, scale: np.ndarray, sums: np.ndarray
) -> int:
    """As `int8_rows`, with the scale that `channel_scale` finds."""
    values, lanes = np.empty(codes.shape[1], np.float32), np.empty((3, LANES), np.float64)
    for i in range(codes.shape[0]):
        largest = decode_row(rows, i, values)
        if largest >= INFINITY:
            return i
        widest = row_scale(largest, INT8_MAXIMUM, scale_dtype)
        scale[i] = searched_scale(values, widest, scale_dtype, INT8_MAXIMUM, least_squares, lanes)
        sums[i] = round_run(values, scale[i], -128, 127, codes[i])
    return -1


@kernel
def searched_int4_rows(
    rows: EncodedRows, scale_dtype: int, least_squares: bool,
    codes: np.ndarray, scale: np.ndarray, second: np.ndarray, bias: np.ndarray,
) -> int:  # fmt: skip
    """As `int4_rows`, with the scales that `channel_scale` or `group_scales` finds."""
    n, k, packed, grouped = scale.shape[0], codes.shape[1], codes.shape[0] < scale.shape[0], second.shape[1] > 0
    values, pair, lanes = np.empty(k, np.float32), np.empty((2, k), np.int8), np.empty((3, LANES), np.float64)
    room, sums = np.empty((2, second.shape[1]), np.float32), np.empty(max(bias.shape[1], 1), np.int32)
    for i in range(n):
        largest = decode_row(rows, i, values)
        if largest >= INFINITY:
            return i
        row = pair[i & 1] if packed else codes[i]
        exact = row_scale(largest, TWO_LEVEL_MAXIMUM if grouped else INT4_MAXIMUM, scale_dtype)
        if grouped:
            second[i] = 1
            if exact > 0:
                exact = two_level_scales(values, exact, least_squares, second[i], room, lanes)
            code_groups(values, exact, second[i], row, sums)
        else:
            exact = searched_scale(values, exact, scale_dtype, INT4_MAXIMUM, least_squares, lanes)
            per_channel(values, exact, row, sums)
        scale[i] = exact
        if grouped:
            exact = scale_in(exact, BFLOAT16)
        for c in range(bias.shape[1]):
            bias[i, c] = 8 * np.float64(exact) * sums[c]
        if packed and i & 1:
            pack_rows(pair[0], pair[1], codes[i >> 1])
    return -1
