"""Weight algorithms: the kernels of each, and those that search for scales. Needs numpy and numba only."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fxquant.kernels.decode import EncodedRows, decode_row
from fxquant.kernels.int4 import INT4_MAXIMUM, TWO_LEVEL_MAXIMUM, int4_rows, pack_rows, per_channel
from fxquant.kernels.int8 import INT8_MAXIMUM, int8_rows
from fxquant.kernels.rounding import BFLOAT16, INFINITY, kernel, round_run, row_scale, scale_in
from fxquant.kernels.search_channel import clip_scale, least_squares_scale
from fxquant.kernels.search_groups import code_groups, two_level_scales
from fxquant.kernels.squared_error import LANES

CLIP, LEAST_SQUARES = 0, 1
"""Searches, as the kernels below know them."""


@kernel
def searched_scale(
    values: np.ndarray, scale: np.float32, dtype: int, maximum: int, search: int, lanes: np.ndarray
) -> np.float32:
    """The best scale of a channel with codes from `-maximum - 1` to `maximum`; a row of zeros keeps 0."""
    if not scale > 0:
        return scale
    if search == LEAST_SQUARES:
        return least_squares_scale(values, scale, dtype, -maximum - 1, maximum, lanes)
    return clip_scale(values, scale, dtype, -maximum - 1, maximum, lanes)[0]


@kernel
def searched_scales(
    values: np.ndarray, scale: np.float32, search: int, second: np.ndarray, room: np.ndarray, lanes: np.ndarray
) -> np.float32:
    """The first-level scale of a row, and `second` float32 [G]; `scale` > 0 is that of its largest magnitude."""
    return two_level_scales(values, scale, search == LEAST_SQUARES, second, room, lanes)


@kernel
def searched_int8_rows(
    rows: EncodedRows, scale_dtype: int, search: int, codes: np.ndarray, scale: np.ndarray, sums: np.ndarray
) -> int:
    """As `int8_rows`, with the scale that `searched_scale` finds."""
    values, lanes = np.empty(codes.shape[1], np.float32), np.empty((3, LANES), np.float64)
    for i in range(codes.shape[0]):
        largest = decode_row(rows, i, values)
        if largest >= INFINITY:
            return i
        widest = row_scale(largest, INT8_MAXIMUM, scale_dtype)
        scale[i] = searched_scale(values, widest, scale_dtype, INT8_MAXIMUM, search, lanes)
        sums[i] = round_run(values, scale[i], -128, 127, codes[i])
    return -1


@kernel
def searched_int4_rows(
    rows: EncodedRows, scale_dtype: int, search: int,
    codes: np.ndarray, scale: np.ndarray, second: np.ndarray, bias: np.ndarray,
) -> int:  # fmt: skip
    """As `int4_rows`, with the scales that `searched_scale` or `searched_scales` finds."""
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
                exact = searched_scales(values, exact, search, second[i], room, lanes)
            code_groups(values, exact, second[i], row, sums)
        else:
            exact = searched_scale(values, exact, scale_dtype, INT4_MAXIMUM, search, lanes)
            per_channel(values, exact, row, sums)
        scale[i] = exact
        if grouped:  # for the bias alone, as in `int4_rows`
            exact = scale_in(exact, BFLOAT16)
        for c in range(bias.shape[1]):
            bias[i, c] = 8 * np.float64(exact) * sums[c]
        if packed and i & 1:
            pack_rows(pair[0], pair[1], codes[i >> 1])
    return -1


@dataclass(frozen=True)
class RowKernels:
    """How an algorithm makes the rows of a weight: `by_bits[bits](rows, scale_dtype, *options, *tensors)`.

    by_bits   bits of a code → its kernel; the tensors are those of `int8_rows`, or for four bits of `int4_rows`
    searches  it tries many scales for each row, and takes some hundred times as long as the largest magnitude
    """

    by_bits: Mapping[int, Callable[..., Any]]
    options: tuple[int, ...] = ()
    searches: bool = True


SEARCHED = {8: searched_int8_rows, 4: searched_int4_rows}
ROW_KERNELS = {
    "min_max": RowKernels({8: int8_rows, 4: int4_rows}, searches=False),
    "clip": RowKernels(SEARCHED, (CLIP,)),
    "least_squares": RowKernels(SEARCHED, (LEAST_SQUARES,)),
}
"""`WeightAlgorithm` that chooses scales → its kernels, for `compile` and for the benchmark that `plan` runs."""
