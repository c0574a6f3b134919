"""Int8 weights: one scale per output channel. Needs numpy and numba only."""

import numpy as np

from fxquant.kernels.decode import EncodedRows, decode_row
from fxquant.kernels.rounding import INFINITY, kernel, round_run, row_scale

INT8_MAXIMUM = 127


@kernel
def int8_rows(rows: EncodedRows, scale_dtype: int, codes: np.ndarray, scale: np.ndarray, sums: np.ndarray) -> int:
    """Rows [n, k] → codes int8 [n, k], scale float32 [n], sums of codes int64 [n]. Returns the first row that is not
    finite, or -1.

    `s = max|W| / 127`, rounded to `scale_dtype`; `q = clamp(rne(W / s), -128, 127)`; a row of zeros has s = 0, q = 0.
    """
    values = np.empty(codes.shape[1], np.float32)
    for i in range(codes.shape[0]):
        largest = decode_row(rows, i, values)
        if largest >= INFINITY:
            return i
        scale[i] = row_scale(largest, INT8_MAXIMUM, scale_dtype)
        sums[i] = round_run(values, scale[i], -128, 127, codes[i])
    return -1
