"""Branches of routed experts: each runs over its own rows, and an expert without rows costs next to nothing.

rows sorted by expert, counts [E]  →  If(a group has rows){ If(a smaller group has rows){ … one expert } }  →  Concat

Groups nest FANOUT wide, so a step asks as many conditions as the logarithm of the experts for each that it uses,
and not one for each that there is. No expert runs on zero rows: onnxruntime's ReduceMax of zero rows has a wrong shape.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from fxquant.lowering.onnx.builder import Builder

FANOUT = 4


@dataclass(frozen=True)
class Like:
    """dtype and dimensions of one row."""

    dtype: ir.DataType
    dims: Sequence[Any]

    @property
    def zero(self) -> ir.TensorProtocol:
        return ir.tensor(np.zeros(1, self.dtype.numpy()))


Run = Callable[[Builder, int, ir.Value, ir.Value], ir.Value]
"""Builder of a branch, an expert, first of its rows and end of them, int64 [1] → its result."""


def run_busy(b: Builder, counts: ir.Value, number: int, like: Like, run: Run) -> ir.Value:
    """int64 `counts` [number] → the experts' results over all rows, expert by expert; `like`: one row of them."""
    ends = b.op("CumSum", counts, b.constant(np.int64(0)))
    starts = b.op("Sub", ends, counts)
    return _Group(range(number), starts, ends).run(b, like, run)


@dataclass(frozen=True)
class _Group:
    """Consecutive experts, the first of their rows and the end of them, each int64 [experts], in one graph."""

    experts: range
    starts: ir.Value
    ends: ir.Value

    def run(self, b: Builder, like: Like, run: Run) -> ir.Value:
        """Results of the experts, one of which at least has rows."""
        if len(self.experts) == 1:
            return run(b, self.experts[0], self.starts, self.ends)
        parts = [group.run_if(b, busy, like, run) for busy, group in self._parts(b)]
        return b.op("Concat", *parts, axis=0)

    def run_if(self, b: Builder, busy: ir.Value, like: Like, run: Run) -> ir.Value:
        """Results of the experts, or no rows."""
        scope = f"{b.scope}{'-'.join(str(expert) for expert in sorted({self.experts[0], self.experts[-1]}))}/"
        inner = Builder()
        inner.enter(scope)
        result = self.run(inner, like, run)
        then = ir.Graph([], [result], nodes=inner.nodes, name="rows")
        inner = Builder()
        inner.enter(f"{scope}no_")
        # not a Constant: OpenVINO reads one without elements as a scalar
        nothing = inner.op("ConstantOfShape", inner.ints(0, *like.dims), value=like.zero)
        otherwise = ir.Graph([], [nothing], nodes=inner.nodes, name="no_rows")
        return b.op("If", busy, then_branch=then, else_branch=otherwise)

    def _parts(self, b: Builder) -> Iterator[tuple[ir.Value, "_Group"]]:
        """At most FANOUT smaller groups, and whether each has rows."""
        width = 1
        while width * FANOUT < len(self.experts):
            width *= FANOUT
        parts = [self.experts[first : first + width] for first in range(0, len(self.experts), width)]
        firsts, lasts = self.starts, self.ends
        if width > 1:
            firsts = b.op("Gather", firsts, b.ints(*(part[0] - self.experts[0] for part in parts)))
            lasts = b.op("Gather", lasts, b.ints(*(part[-1] - self.experts[0] for part in parts)))
        number, sizes = len(parts), b.ints(*map(len, parts))
        busy = b.ops("Split", b.op("Less", firsts, lasts), b.ints(*[1] * number), outputs=number, axis=0)
        starts, ends = (b.ops("Split", column, sizes, outputs=number, axis=0) for column in (self.starts, self.ends))
        yield from zip(busy, map(_Group, parts, starts, ends), strict=True)
