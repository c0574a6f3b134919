"""Routed experts: one function for the computation of an expert, called for each expert that has rows.

rows, counts  →  for each expert that has rows: slice its rows, call the function  →  Concat

Weights are initializers of the main graph: onnxruntime reads external data of a branch through no link, and not at all
in a browser.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from fxquant import ops
from fxquant.lowering.onnx.builder import Builder
from fxquant.lowering.onnx.expert_branches import Like, run_busy
from fxquant.lowering.onnx.function_table import FunctionTable, forget_types, formal
from fxquant.lowering.onnx.functions import BODIES, VIEWS
from fxquant.lowering.onnx.functions.moe import routed_expert
from fxquant.lowering.onnx.initializers import Initializers, View
from fxquant.lowering.onnx.node_lowering import NodeLowering, unsupported
from fxquant.lowering.onnx.regions import GROUPED, Region, expert_arguments
from fxquant.lowering.onnx.shapes import Shapes
from fxquant.program.linears import PROJECTIONS
from fxquant.program.operands import operand_node
from fxquant.program.program import Program

NAME = "routed_expert"
PREFIX = "expert_"
"""Functions that an expert calls are its own: onnxruntime names the values of an inlined function after it, once in a
branch and once in the main graph, and does not load again what it saved so."""


@dataclass(frozen=True)
class Stacked:
    """One weight of all experts: its tensors on disk, expert 0 first, and how their bytes are declared."""

    names: tuple[str, ...]
    view: View


class Experts:
    """Emits routed experts into the main graph."""

    def __init__(self, program: Program, initializers: Initializers, functions: FunctionTable) -> None:
        self._program, self._initializers, self._functions = program, initializers, functions

    def region(self, lowering: NodeLowering, region: Region) -> None:
        """Emit the computation of a region; the result has the name of its output node."""
        lowering.builder.enter(f"{region.output.name}/")
        stacked = {node: self._stacked(node, _view(region, node)) for node in region.stacked}
        outside = {node: lowering.value(node) for node in (*region.by_row, *region.whole)}
        by_row, whole = ([outside[node] for node in nodes] for nodes in (region.by_row, region.whole))
        meta = lowering.shapes[region.output]
        like = Like(meta.onnx_dtype, meta.fixed[1:])
        order = (*region.by_row, *region.whole, *region.stacked)
        if self._functions.inline:

            def run(b: Builder, *values: ir.Value) -> ir.Value:
                return self._lower(b, region, lowering.shapes, dict(zip(order, values, strict=True)))
        else:
            function = self._function(region, lowering.shapes, outside, stacked)

            def run(b: Builder, *values: ir.Value) -> ir.Value:
                return b.call(function, values)[0]

        counts = lowering.value(region.counts)
        result = self._emit(lowering.builder, run, by_row, whole, list(stacked.values()), counts, like)
        lowering.set(region.output, result)

    def node(self, lowering: NodeLowering, node: fx.Node) -> None:
        """Emit one `fxq::moe_experts`: sort, float experts, weighted sum."""
        b = lowering.builder
        b.enter(f"{node.name}/")
        x, ids, weights = (lowering.value(operand_node(node, name)) for name in ("x", "ids", "weights"))
        projections = [self._stacked(operand_node(node, name), View.STORED) for name in PROJECTIONS]
        number = len(projections[0].names)
        routing = {"x": x, "ids": ids, "num_experts": number}
        rows, row_index, counts = lowering.call("moe_init_routing", BODIES[ops.moe_init_routing], routing)
        rows.dtype, rows.shape = x.dtype, ir.Shape([None, x.shape[-1]])
        names = ("rows", *PROJECTIONS)

        def run(inner: Builder, *values: ir.Value) -> ir.Value:
            own = dict(zip(names, values, strict=True))
            return self._functions.call(inner, NAME, routed_expert, own)[0]

        parts = self._emit(b, run, [rows], [], projections, counts, Like(ir.DataType.FLOAT, x.shape[-1:]))
        parts.dtype, parts.shape = rows.dtype, rows.shape
        finalize = {"rows": parts, "row_index": row_index, "weights": weights}
        lowering.set(node, lowering.call("moe_finalize_routing", BODIES[ops.moe_finalize_routing], finalize))

    def _stacked(self, node: fx.Node, view: View) -> Stacked:
        return Stacked(self._program.parameters[str(node.target)].names, view)

    def _first(self, parameter: Stacked) -> ir.Value:
        """The first expert's tensor, for dtype and shape of all."""
        return self._initializers.get(parameter.names[0], parameter.view)

    def _function(
        self, region: Region, shapes: Shapes, outside: Mapping[fx.Node, ir.Value], stacked: Mapping[fx.Node, Stacked]
    ) -> ir.Function:
        formals: dict[fx.Node, ir.Value] = {}
        for index, (node, value) in enumerate(outside.items()):
            formals[node] = formal(f"rows_{index}" if node in region.by_row[1:] else f"input_{index}", value)
        formals[region.rows].name = "rows"
        for node, parameter in stacked.items():
            formals[node] = formal("_".join(str(node.target).split(".")[-2:]), self._first(parameter))
        b = Builder()
        result = self._lower(b, region, shapes, formals)
        return self._functions.add(NAME, list(formals.values()), [result], b.nodes)

    def _lower(self, b: Builder, region: Region, shapes: Shapes, values: Mapping[fx.Node, ir.Value]) -> ir.Value:
        """The nodes of a region for one expert; `values` of all that it reads."""
        inner = NodeLowering(b, self._functions, lambda node, _: inner.values[node], shapes, False, PREFIX)
        inner.values = {node: _widened(b, value) for node, value in values.items()}
        for node in region.nodes:
            if node.target in GROUPED:
                operator = GROUPED[node.target]
                arguments = {name: inner.value(arg) for name, arg in expert_arguments(node).items()}
                optional = {argument.name: None for argument in operator._schema.arguments}
                inner.set(node, inner.call(operator._opname, BODIES[operator], optional | arguments))
            else:
                inner.lower(node)
        result: ir.Value = inner.values[region.output]
        return result

    def _emit(
        self, b: Builder, run: Callable[..., ir.Value], by_row: Sequence[ir.Value], whole: Sequence[ir.Value],
        stacked: Sequence[Stacked], counts: ir.Value, like: Like,
    ) -> ir.Value:  # fmt: skip
        """int64 `counts` [E] → what `run` makes of all rows, expert by expert; `like`: one row of it."""

        def run_one(inner: Builder, expert: int, start: ir.Value, end: ir.Value) -> ir.Value:
            weights = [self._initializers.get(parameter.names[expert], parameter.view) for parameter in stacked]
            rows = [inner.op("Slice", value, start, end, inner.ints(0)) for value in by_row]
            if not self._functions.inline:
                return run(inner, *rows, *whole, *weights)
            for part, value in zip(rows, by_row, strict=True):
                part.type, part.shape = value.type, formal("", value).shape
            result = run(inner, *rows, *whole, *weights)
            forget_types(inner.nodes)
            return result

        return run_busy(b, counts, len(stacked[0].names), like, run_one)


def _view(region: Region, parameter: fx.Node) -> View:
    """How the operators that read a stacked parameter declare its bytes."""
    views = {
        VIEWS.get((node.target, name), View.STORED)
        for node in region.nodes
        if node.target in GROUPED
        for name, arg in expert_arguments(node).items()
        if arg is parameter
    }
    if len(views) != 1:
        raise unsupported(parameter, "is not read by grouped operators of one kind")
    return views.pop()


def _widened(b: Builder, value: ir.Value) -> ir.Value:
    """int4 as int8: onnxruntime passes int4 to an inner function only if a standard operator reads it first."""
    if value.dtype != ir.DataType.INT4:
        return value
    shape, wide = value.shape, b.cast(value, ir.DataType.INT8)
    wide.shape = shape
    return wide
