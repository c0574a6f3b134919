"""Decoding of bfloat16, float16 and block-scaled FP8 rows to float32, one at a time. Needs numpy and numba only."""

from typing import NamedTuple

import numpy as np

from fxquant.kernels.rounding import (
    BFLOAT16,
    FLOAT8,
    FLOAT16,
    FLOAT32,
    MAGNITUDE,
    bits_of,
    float_of,
    kernel,
    round_row,
)

NAN = np.uint32(0x7FC00000)


class EncodedRows(NamedTuple):
    """Rows [n, k] of a weight with the parameters of their decoding. Arrays are C-contiguous and read-only.

    raw      uint8 [n, k * itemsize], little-endian
    stored   FLOAT32, BFLOAT16, FLOAT16 or FLOAT8 (E4M3)
    start    index of the first row in the weight
    scales   float32 [row blocks, column blocks] of the whole weight for FLOAT8, else [0, 0]
    block_rows, block_columns  block size
    smooth   float32 [k], or [0]
    divided  float32 [rows of the weight], or [0]
    rounded  dtype that decoded FLOAT8 and smoothed values are rounded to
    """

    raw: np.ndarray
    stored: int
    start: int
    scales: np.ndarray
    block_rows: int
    block_columns: int
    smooth: np.ndarray
    divided: np.ndarray
    rounded: int


@kernel
def decode_bfloat16(row: np.ndarray, values: np.ndarray) -> np.uint32:
    """uint16 [k] → float32 [k]; returns the largest magnitude."""
    largest = np.uint32(0)
    for j in range(row.shape[0]):
        bits = np.uint32(row[j]) << np.uint32(16)
        values[j] = float_of(np.uint32(bits))
        largest = np.uint32(max(largest, np.uint32(bits & MAGNITUDE)))
    return largest


@kernel
def decode_float16(row: np.ndarray, values: np.ndarray) -> np.uint32:
    """uint16 [k] → float32 [k]; returns the largest magnitude. Subnormals: `float(2**-14 + x) - 2**-14`, exact."""
    largest = np.uint32(0)
    smallest, step = np.float32(2.0**-14), np.uint32(112 << 23)  # 112 = 127 - 15, the difference of exponent biases
    for j in range(row.shape[0]):
        code = np.uint32(row[j])
        shifted = np.uint32((code & np.uint32(0x7FFF)) << np.uint32(13))
        normal = np.uint32(shifted + step)
        special = np.uint32(normal + step)  # infinity and NaN: exponent 31 must become 255, 31 + 2 * 112
        value = float_of(np.uint32(special if shifted >= np.uint32(31 << 23) else normal))
        subnormal = float_of(np.uint32(shifted + np.uint32(113 << 23))) - smallest
        value = subnormal if shifted < np.uint32(1 << 23) else value
        magnitude = bits_of(value)
        values[j] = float_of(np.uint32(magnitude | np.uint32((code & np.uint32(0x8000)) << np.uint32(16))))
        largest = np.uint32(max(largest, magnitude))
    return largest


@kernel
def decode_float8(row: np.ndarray, scale: np.float32, values: np.ndarray) -> None:
    """E4M3 uint8 [k] → float32 [k], times one scale. Codes 0x7f and 0xff are NaN; there is no infinity."""
    smallest = np.float32(2.0**-6)  # below: 120 = 127 - 7, the difference of exponent biases
    for j in range(row.shape[0]):
        code = np.uint32(row[j])
        magnitude = np.uint32(code & np.uint32(0x7F))
        shifted = np.uint32(magnitude << np.uint32(20))
        subnormal = float_of(np.uint32(shifted + np.uint32(121 << 23))) - smallest
        value = subnormal if magnitude < np.uint32(8) else float_of(np.uint32(shifted + np.uint32(120 << 23)))
        value = float_of(NAN) if magnitude == np.uint32(0x7F) else value
        sign = np.uint32((code & np.uint32(0x80)) << np.uint32(24))
        values[j] = float_of(np.uint32(bits_of(value) | sign)) * scale


@kernel
def decode_row(rows: EncodedRows, index: int, values: np.ndarray) -> np.uint32:
    """Row `index` of `rows` → float32 [k]; returns the bits of its largest magnitude.

    FLOAT8 is `rounded(float32(w) * scale)` with the scale of its block; then `rounded(W * smooth)` and
    `rounded(W / divided)`, where given.
    """
    row = rows.raw[index]
    if rows.stored == BFLOAT16:
        largest = decode_bfloat16(row.view(np.uint16), values)
    elif rows.stored == FLOAT16:
        largest = decode_float16(row.view(np.uint16), values)
    elif rows.stored == FLOAT8:
        scales = rows.scales[(rows.start + index) // rows.block_rows]  # blocks count from the weight's first row
        for block in range(scales.shape[0]):
            first = block * rows.block_columns
            run = row[first : first + rows.block_columns]
            decode_float8(run, scales[block], values[first : first + rows.block_columns])
        # rounded as in `Checkpoint.read`: the float graph must run on the weight that is quantized here
        largest = round_row(values, rows.rounded)
    else:
        values[:] = row.view(np.float32)
        largest = round_row(values, FLOAT32)
    if rows.smooth.shape[0]:
        for j in range(values.shape[0]):
            values[j] *= rows.smooth[j]
        largest = round_row(values, rows.rounded)
    if rows.divided.shape[0]:
        divisor = rows.divided[rows.start + index]
        for j in range(values.shape[0]):
            values[j] /= divisor
        largest = round_row(values, rows.rounded)
    return largest
