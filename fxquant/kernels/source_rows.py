"""Source rows: rows of a weight as a checkpoint stores them, not decoded."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxquant.kernels.decode import EncodedRows
from fxquant.kernels.rounding import BFLOAT16, FLOAT8, FLOAT16, FLOAT32

KERNEL_DTYPES = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
    torch.float8_e4m3fn: FLOAT8,
}


@dataclass(frozen=True)
class SourceRows:
    """Some rows of a weight [n, k], as stored.

    raw          uint8, C-contiguous, the little-endian bytes of the rows; any shape
    dtype        as stored: bfloat16, float16, float32 or float8_e4m3fn
    in_features  k
    start        index of the first row in the weight; selects the block scales
    model_dtype  dtype that decoded FP8 and smoothed values are rounded to
    scale_inv    float32 [ceil(n / block[0]), ceil(k / block[1])] of the whole weight, for FP8
    smooth       float32 [k] or None: `W' = model_dtype(W * smooth)`
    divided      float32 [n] of the whole weight, or None: then `W' = model_dtype(W / divided)`, row by row
    """

    raw: np.ndarray
    dtype: torch.dtype
    in_features: int
    start: int = 0
    model_dtype: torch.dtype = torch.bfloat16
    scale_inv: np.ndarray | None = None
    block: tuple[int, int] = (128, 128)
    smooth: np.ndarray | None = None
    divided: np.ndarray | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.raw.size // (self.in_features * self.dtype.itemsize)

    def encoded(self) -> EncodedRows:
        """The rows in the form of the kernels; nothing is copied."""
        if (self.dtype is torch.float8_e4m3fn) is (self.scale_inv is None):
            raise ValueError(f"{self.dtype} rows {'without' if self.scale_inv is None else 'with'} block scales")
        scales = np.empty((0, 0), np.float32) if self.scale_inv is None else self.scale_inv
        smooth, divided = (
            np.empty(0, np.float32) if vector is None else vector for vector in (self.smooth, self.divided)
        )
        edges = (self.start + self.rows, self.in_features)
        blocks = tuple(-(-edge // size) for edge, size in zip(edges, self.block, strict=True))
        if self.scale_inv is not None and (scales.shape[0] < blocks[0] or scales.shape[1:] != blocks[1:]):
            raise ValueError(f"block scales {scales.shape} for rows to {edges[0]} of {edges[1]} in {self.block}")
        if self.smooth is not None and smooth.shape != (self.in_features,):
            raise ValueError(f"{smooth.shape} smoothing scales for rows of {self.in_features}")
        if self.divided is not None and len(divided) < edges[0]:
            raise ValueError(f"{divided.shape} smoothing scales for rows to {edges[0]}")
        return EncodedRows(
            _read_only(self.raw.reshape(self.rows, self.in_features * self.dtype.itemsize)),
            KERNEL_DTYPES[self.dtype],
            self.start,
            _read_only(scales.astype(np.float32, copy=False)),
            *self.block,
            _read_only(smooth.astype(np.float32, copy=False)),
            _read_only(divided.astype(np.float32, copy=False)),
            KERNEL_DTYPES[self.model_dtype],
        )


def rows_of(weight: Tensor) -> SourceRows:
    """All rows of a tensor [n, k] of float32, bfloat16 or float16, sharing its memory."""
    raw = weight.detach().contiguous().view(torch.uint8).numpy()
    return SourceRows(raw, weight.dtype, weight.shape[1], model_dtype=weight.dtype)


def _read_only(array: np.ndarray) -> np.ndarray:
    """A read-only view, as of a mapped file: numba compiles a kernel again for every array type, writable or not."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view
