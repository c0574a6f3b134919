"""Rotary tables as complex numbers, for an attention that is traced by its own forward: pairs of real tensors.

A forward that multiplies `view_as_complex(x)` with a table, and takes `view_as_real` of the product, runs unchanged.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Pairs:
    """Complex numbers as two real tensors of one shape; torch's functions on them come to `__torch_function__`."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @property
    def shape(self) -> torch.Size:
        """Of either part."""
        return self.real.shape

    def __mul__(self, other: Any) -> "Pairs":
        theirs = of_complex(other)
        real = self.real * theirs.real - self.imag * theirs.imag
        return Pairs(real, self.real * theirs.imag + self.imag * theirs.real)

    __rmul__ = __mul__

    def conj(self) -> "Pairs":
        """The opposite rotation."""
        return Pairs(self.real, -self.imag)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if function in (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__):
            return of_complex(args[0]) * of_complex(args[1])
        if function is torch.view_as_real:
            return torch.stack((args[0].real, args[0].imag), -1)
        raise ValueError(f"it calls {function.__name__} on its rotary table")


class Rows(Pairs):
    """The rows [S, width] of a rotary table that belong to the new positions, and are [B, S, width] inside."""

    def view(self, *shape: int) -> Pairs:
        """(1, S, 1, width), or 1 for other dimensions that the rows do not have: these stay, the first is B."""
        sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        last = [place for place, size in enumerate(sizes) if place > 1 and not (isinstance(size, int) and size == 1)]
        last = last or [len(sizes) - 1]
        if len(last) != 1 or sizes[0] != 1:
            raise ValueError(f"it reads its rotary table by view{tuple(sizes)}")
        return self._spread(len(sizes), last[0])

    reshape = view

    def __getitem__(self, index: Any) -> Pairs:
        index = index if isinstance(index, tuple) else (index,)
        named = [place for place, each in enumerate(index) if each is not None]
        rest = 2 - len(named)
        if any(each not in (None, slice(None), Ellipsis) for each in index) or index[0] is not None or named[:1] != [1]:
            raise ValueError("it reads its rotary table by places")
        return self._spread(len(index) + rest, (named + [len(index)])[1])

    def unsqueeze(self, dim: int) -> "Rows":
        """Room for the rows (0), which is there already."""
        if dim != 0:
            raise ValueError(f"it reads its rotary table by unsqueeze({dim})")
        return self

    def _spread(self, dims: int, last: int) -> Pairs:
        index: list[Any] = [None] * dims
        index[0] = index[1] = index[last] = slice(None)
        return Pairs(self.real[tuple(index)], self.imag[tuple(index)])


class Table:
    """Stands for the buffer of all positions' rotations: any rows that are asked for are those of the new positions."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: Any) -> Rows:
        if not isinstance(index, slice):
            raise ValueError("it reads its rotary table other than by [start : end]")
        return self.rows

    def to(self, *_: Any, **__: Any) -> "Table":
        """The same."""
        return self


def of_complex(value: Any) -> Pairs:
    """A complex tensor as pairs."""
    if isinstance(value, Pairs):
        return value
    parts = torch.view_as_real(value)
    return Pairs(parts[..., 0], parts[..., 1])


def rows(cos: Tensor, sin: Tensor) -> Rows:
    """cos, sin [B, S, qk_rope_head_dim], both halves equal → the rotations [B, S, qk_rope_head_dim / 2]."""
    width = cos.shape[-1] // 2
    return Rows(cos[..., :width], sin[..., :width])
