"""aten operators that move elements without changing them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from fxquant.lowering.onnx.builder import Builder, Size

END = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Result:
    """A call's result in the graph: dtype, and for each output its dimensions, None if dynamic."""

    dtype: ir.DataType
    dims: tuple[list[int | None], ...]

    @property
    def rank(self) -> int:
        return len(self.dims[0])


Lower = Callable[..., Any]
"""(builder, result, schema arguments by name, `self` and `input` as `x`) → the value or a tuple of values."""


def rank(x: ir.Value) -> int:
    assert x.shape is not None
    return len(x.shape)


def axis(dim: int, of: int) -> int:
    return dim + of if dim < 0 else dim


def reshape(b: Builder, out: Result, x: ir.Value, size: Sequence[Size]) -> ir.Value:
    # allowzero: 0 is a size, such as the empty past of a first call, not "as in x"
    return b.op("Reshape", x, b.sizes(*size), allowzero=1)


def reshape_to(b: Builder, out: Result, x: ir.Value, shape: Sequence[Size]) -> ir.Value:
    return reshape(b, out, x, shape)


def flatten(b: Builder, out: Result, x: ir.Value, start_dim: int, end_dim: int) -> ir.Value:
    start, end = axis(start_dim, rank(x)), axis(end_dim, rank(x))
    merged = b.op("ReduceProd", b.op("Shape", x, start=start, end=end + 1), keepdims=1)
    parts = [b.op("Shape", x, start=0, end=start), merged, b.op("Shape", x, start=end + 1)]
    return b.op("Reshape", x, b.op("Concat", *parts, axis=0), allowzero=1)


def unflatten(b: Builder, out: Result, x: ir.Value, dim: int, sizes: Sequence[Size]) -> ir.Value:
    at = axis(dim, rank(x))
    parts = [b.op("Shape", x, start=0, end=at), b.sizes(*sizes), b.op("Shape", x, start=at + 1)]
    return b.op("Reshape", x, b.op("Concat", *parts, axis=0), allowzero=1)


def permute(b: Builder, out: Result, x: ir.Value, dims: Sequence[int]) -> ir.Value:
    return b.op("Transpose", x, perm=[axis(dim, rank(x)) for dim in dims])


def transpose(b: Builder, out: Result, x: ir.Value, dim0: int, dim1: int) -> ir.Value:
    perm = list(range(rank(x)))
    first, second = axis(dim0, rank(x)), axis(dim1, rank(x))
    perm[first], perm[second] = perm[second], perm[first]
    return b.op("Transpose", x, perm=perm)


def reverse(b: Builder, out: Result, x: ir.Value) -> ir.Value:
    return b.op("Transpose", x)


def unsqueeze(b: Builder, out: Result, x: ir.Value, dim: int) -> ir.Value:
    return b.op("Unsqueeze", x, b.ints(dim))


def squeeze(b: Builder, out: Result, x: ir.Value, dim: int | Sequence[int]) -> ir.Value:
    assert x.shape is not None
    dims = [axis(d, rank(x)) for d in ([dim] if isinstance(dim, int) else dim)]
    single = [d for d in dims if x.shape[d] == 1]
    return b.op("Squeeze", x, b.ints(*single)) if single else x


def expand(b: Builder, out: Result, x: ir.Value, size: Sequence[Size]) -> ir.Value:
    sizes = [1 if isinstance(dimension, int) and dimension == -1 else dimension for dimension in size]
    return b.op("Expand", x, b.sizes(*sizes))


def repeat(b: Builder, out: Result, x: ir.Value, repeats: Sequence[Size]) -> ir.Value:
    missing = list(range(len(repeats) - rank(x)))
    wide = b.op("Unsqueeze", x, b.ints(*missing)) if missing else x
    return b.op("Tile", wide, b.sizes(*repeats))


def slice_(b: Builder, out: Result, x: ir.Value, dim: int, start: Size | None, end: Size | None, step: int) -> ir.Value:
    first, last = b.sizes(0 if start is None else start), b.sizes(END if end is None else end)
    return b.op("Slice", x, first, last, b.ints(dim), b.ints(step))


def select(b: Builder, out: Result, x: ir.Value, dim: int, index: Size) -> ir.Value:
    return b.op("Squeeze", b.op("Gather", x, b.sizes(index), axis=dim), b.ints(dim))


def split(b: Builder, out: Result, x: ir.Value, dim: int) -> tuple[ir.Value, ...]:
    """Any split: the sizes are those of the results in the graph."""
    sizes = [dims[dim] for dims in out.dims]
    fixed = [size for size in sizes if size is not None]
    if len(fixed) != len(sizes):
        raise ValueError("splits a dynamic dimension")
    return b.ops("Split", x, b.ints(*fixed), outputs=len(fixed), axis=dim)


def unbind(b: Builder, out: Result, x: ir.Value, dim: int) -> tuple[ir.Value, ...]:
    parts = b.ops("Split", x, outputs=len(out.dims), axis=dim, num_outputs=len(out.dims))
    return tuple(b.op("Squeeze", part, b.ints(dim)) for part in parts)


def size_of(b: Builder, out: Result, x: ir.Value, dim: int) -> ir.Value:
    return b.size(x, axis(dim, rank(x)))


def index_select(b: Builder, out: Result, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    return b.op("Gather", x, index, axis=dim)


def gather(b: Builder, out: Result, x: ir.Value, dim: int, index: ir.Value) -> ir.Value:
    """In both torch and ONNX, `index` may be smaller than `x` in dimensions other than `dim`."""
    return b.op("GatherElements", x, index, axis=dim)
