"""Large matrices: float weights that stay on disk, of which operators take a block of rows at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, Self

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from fxquant.ops import REFERENCES
from fxquant.runtime.weight_providers import Read

WHOLE = 1 << 27
"""Bytes in float32 up to which a weight is read whole."""
NUMBERS = 1 << 20
"""Numbers of a block of rows."""
ReadRows = Callable[[str, int, int], Tensor]
"""(name, first row, end) → these rows of a stored matrix."""


class Stored(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class LargeMatrix:
    """A float matrix [n, k] in place of a tensor, in `dtype`, never whole in memory.

    Products with it are made in blocks of rows, an embedding reads the rows of its tokens. All other functions and
    methods get the whole tensor.
    """

    nbytes = 0
    """None are held."""

    def __init__(self, rows: Callable[[int, int], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._rows, self.shape, self.dtype = rows, torch.Size(shape), dtype

    def __len__(self) -> int:
        return self.shape[0]

    def split(self, count: int | None = None) -> Iterator[Tensor]:
        """Consecutive blocks of `count` rows."""
        count = count or rows_of_a_block(self.shape[1])
        for start in range(0, self.shape[0], count):
            yield self._rows(start, min(start + count, self.shape[0])).to(self.dtype)

    def __getitem__(self, ids: Tensor) -> Tensor:
        """ids int64 [...] → [..., k]; a row is read once."""
        used, places = ids.unique(return_inverse=True)
        return torch.cat([self._rows(row, row + 1) for row in used.tolist()]).to(self.dtype)[places]

    def to(self, target: torch.dtype | torch.device | str) -> Self:
        """In another dtype; rows are on CPU."""
        return type(self)(self._rows, self.shape, target) if isinstance(target, torch.dtype) else self

    def float(self) -> Self:
        """In float32."""
        return self.to(torch.float32)

    def is_floating_point(self) -> bool:
        """As of a tensor."""
        return True

    def whole(self) -> Tensor:
        """All rows."""
        return self._rows(0, self.shape[0]).to(self.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole(), name)

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        in_blocks = IN_BLOCKS.get(function) or REFERENCES.get(function)
        if in_blocks is None:
            args, kwargs = (torch.utils._pytree.tree_map_only(cls, cls.whole, given) for given in (args, kwargs))
        return (in_blocks or function)(*args, **(kwargs or {}))


def rows_of_a_block(columns: int) -> int:
    """How many rows of so many numbers are taken at a time; an even number."""
    return max(1, NUMBERS // (2 * columns)) * 2


def side_by_side(parts: Iterable[Tensor], width: int) -> Tensor:
    """Parts [..., n] that make a tensor [..., width].

    Each goes to its place before the next is made: small results kept among large temporaries would fragment the heap.
    """
    whole, start = torch.empty(0), 0
    for part in parts:
        if not start:
            whole = part.new_empty(*part.shape[:-1], width)
        whole[..., start : start + part.shape[-1]] = part
        start += part.shape[-1]
    return whole


def _linear(x: Tensor, weight: LargeMatrix, bias: Tensor | None = None) -> Tensor:
    product = side_by_side((linear(x, rows) for rows in weight.split()), len(weight))
    return product if bias is None else product + bias


def _embedding(ids: Tensor, weight: LargeMatrix, **options: Any) -> Tensor:
    """Options of a plain embedding change gradients alone."""
    assert not options.get("max_norm"), "rows are not normalized here"
    return weight[ids]


IN_BLOCKS: dict[Any, Callable[..., Tensor]] = {linear: _linear, embedding: _embedding}


def with_large_matrices(read: Read, stored: Mapping[str, Stored], read_rows: ReadRows) -> Read:
    """`read`, except for the float matrices among `stored` that would take more than `WHOLE` bytes in float32."""

    def read_one(name: str) -> Tensor:
        info = stored.get(name)
        if info is None or not is_large(info):
            return read(name)
        rows: Any = LargeMatrix(lambda start, end: read_rows(name, start, end), info.shape, info.dtype)
        return rows

    return read_one


def is_large(info: Stored) -> bool:
    """Whether a stored tensor is a float matrix that is not read whole."""
    numbers = torch.Size(info.shape).numel()
    return len(info.shape) == 2 and info.dtype.is_floating_point and 4 * numbers > WHOLE
