"""Shapes of the graph's values: which dimensions are fixed, and the names of the others.

The shape rules run twice, for two choices of batch, sequence and past: a dimension that is the same both times is
fixed. So nothing depends on how the graph was created or read back.
"""

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.program.meta import call_on_meta
from fxquant.program.program import Program

DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float64: ir.DataType.DOUBLE,
    torch.int8: ir.DataType.INT8,
    torch.int16: ir.DataType.INT16,
    torch.int32: ir.DataType.INT32,
    torch.int64: ir.DataType.INT64,
    torch.bool: ir.DataType.BOOL,
}
"""uint8 is not included: in emitted graphs it means int8 + 128."""

SIZES = {"batch": (2, 3), "sequence": (5, 7), "past": (11, 13), "total": (16, 20)}
"""Two sizes for each dimension that callers choose; total = past + sequence. A pair occurs once, so it names one."""
NAMES = {sizes: name for name, sizes in SIZES.items()}
FIRST_CACHE = 3
"""Placeholders before it are input_ids, attention_mask and position_ids."""


@dataclass(frozen=True)
class Meta:
    """dtype and dimensions of a value; a dynamic one is a name or "?sizes". `number`: the value is a Python int."""

    dtype: torch.dtype
    dims: tuple[int | str, ...]
    number: bool = False

    @property
    def onnx_dtype(self) -> ir.DataType:
        """dtype in the ONNX graph: int8 is carried as uint8 = int8 + 128."""
        return ir.DataType.UINT8 if self.dtype is torch.int8 else DTYPES[self.dtype]

    @property
    def fixed(self) -> list[int | None]:
        return [dim if isinstance(dim, int) else None for dim in self.dims]

    @property
    def shape(self) -> ir.Shape:
        """Shape with the names of those dynamic dimensions that have one."""
        return ir.Shape([None if isinstance(dim, str) and dim.startswith("?") else dim for dim in self.dims])


class Shapes:
    """`shapes[node]`: the Meta of its value, or a tuple of them."""

    def __init__(self, program: Program) -> None:
        self._metas: dict[fx.Node, Any] = {}
        first, second = (_run(program, sample) for sample in (0, 1))
        for node, value in first.items():
            self._metas[node] = _meta(node, value, second[node])

    def __getitem__(self, node: fx.Node) -> Any:
        return self._metas[node]

    def rename(self, node: fx.Node, dimension: str, name: str) -> None:
        """Call a named dimension of the value, or of all results, otherwise."""
        metas = tuple(
            replace(meta, dims=tuple(name if dim == dimension else dim for dim in meta.dims))
            for meta in self.outputs(node)
        )
        self._metas[node] = metas if isinstance(self._metas[node], tuple) else metas[0]

    def outputs(self, node: fx.Node) -> tuple[Meta, ...]:
        """Metas of all results, a tuple also for calls with one result."""
        metas = self._metas[node]
        return metas if isinstance(metas, tuple) else (metas,)


def _run(program: Program, sample: int) -> dict[fx.Node, Any]:
    values: dict[fx.Node, Any] = {}
    placeholders = program.graph.graph.find_nodes(op="placeholder")
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            values[node] = _input(node, placeholders.index(node), sample)
        elif node.op == "get_attr":
            values[node] = program.graph.tensor(str(node.target))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = call_on_meta(node.target, args, kwargs)
    return values


def _input(node: fx.Node, index: int, sample: int) -> torch.Tensor:
    meta = node.meta["val"]
    sizes = [SIZES["batch"][sample], *(int(size) for size in meta.shape[1:])]
    # the axis of tokens is the last but one of a cache
    axis, second = (meta.dim() - 2, "past") if index >= FIRST_CACHE else (1, "total" if index == 1 else "sequence")
    sizes[axis] = SIZES[second][sample]
    return torch.empty(sizes, dtype=meta.dtype, device="meta")


def _meta(node: fx.Node, first: Any, second: Any) -> Any:
    if isinstance(first, list | tuple):
        return tuple(_meta(node, *pair) for pair in zip(first, second, strict=True))
    if not isinstance(first, torch.Tensor):
        return Meta(torch.int64, (1,), number=True)
    if first.dtype not in DTYPES:
        remedy = f"Use {', '.join(str(dtype).removeprefix('torch.') for dtype in DTYPES)}."
        raise FxquantError(node.name, f"is {first.dtype}, which has no ONNX form here.", remedy)
    dims = zip(first.shape, second.shape, strict=True)
    return Meta(first.dtype, tuple(a if a == b else NAMES.get((a, b), f"?{a},{b}") for a, b in dims))
