"""Regions of routed experts: the calls on rows sorted by expert, from `moe_init_routing` to `moe_finalize_routing`."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.aten import ATEN, SHAPE_OPERATORS
from fxquant.lowering.onnx.shapes import Shapes
from fxquant.ops import joined, quantized
from fxquant.program.operands import arguments, item_of, operand
from fxquant.program.program import Program

GROUPED = {
    grouped: plain for plain, grouped in (quantized.GROUPED | joined.GROUPED_LINEARS).items() if grouped is not plain
}
"""Operator over rows sorted by expert → the same operator for one expert, without `counts`."""
ALONG_A_DIMENSION = (
    ATEN.softmax.int, ATEN.log_softmax.int, ATEN.cumsum.default, ATEN.gather.default, ATEN.index_select.default,
)  # fmt: skip
"""Operators that mix elements along `dim` but keep the shape, which therefore does not show whether rows stay apart."""
ONE_EXPERT = "An expert sees only its own rows: keep rows apart and use static shapes, or move it outside the experts."


@dataclass(frozen=True)
class Region:
    """Calls that depend on the sorted rows, in graph order; each runs on one expert's rows at a time.

    rows, counts  outputs of `moe_init_routing`
    output        the only value that is read outside the region
    by_row        inputs with one row per sorted copy of a token, `rows` first
    whole         inputs that all experts share: parameters that are not stacked, values of static shape
    stacked       parameters with one tensor per expert
    """

    rows: fx.Node
    counts: fx.Node
    nodes: tuple[fx.Node, ...]
    output: fx.Node
    by_row: tuple[fx.Node, ...]
    whole: tuple[fx.Node, ...]
    stacked: tuple[fx.Node, ...]


def find_regions(program: Program, shapes: Shapes) -> Iterator[Region]:
    """One region per `moe_init_routing`, in graph order."""
    for routing in program.nodes(ops.moe_init_routing):
        outputs = {item_of(user)[1]: user for user in routing.users}
        if 0 not in outputs or 2 not in outputs:
            raise FxquantError(routing.name, "its rows or counts are not used.", "Remove it, or use both.")
        yield _region(program, shapes, outputs[0], outputs[2])


def _region(program: Program, shapes: Shapes, rows: fx.Node, counts: fx.Node) -> Region:
    inside = {rows}
    for node in program.graph.graph.nodes:
        if node.target != ops.moe_finalize_routing and inside.intersection(node.all_input_nodes):
            inside.add(node)
    nodes = tuple(node for node in program.graph.graph.nodes if node in inside and node is not rows)
    leaving = [node for node in (rows, *nodes) if any(user not in inside for user in node.users)]
    if len(leaving) != 1 or leaving[0] is rows or any(node.op == "output" for node in nodes):
        names = ", ".join(node.name for node in leaving)
        fact = f"{names or 'no value'} is read outside the experts, where exactly one computed value is expected."
        raise FxquantError(rows.name, fact, "Join the rows again in one moe_finalize_routing.")
    for node in nodes:
        _check_apart(node, shapes, shapes[rows].dims[0])
    inputs = list(dict.fromkeys(argument for node in nodes for argument in _arguments(node) if argument not in inside))
    stacked = [node for node in inputs if node.op == "get_attr" and program.parameters[str(node.target)].stacked]
    shared = [node for node in inputs if node not in stacked]
    by_row = [node for node in shared if shapes[node].dims[:1] == shapes[rows].dims[:1]]
    whole = [node for node in shared if node not in by_row]
    for node in whole:
        if shapes[node].number or None in shapes[node].fixed:
            raise FxquantError(node.name, "is dynamic inside the experts, but not one row per copy.", ONE_EXPERT)
    return Region(rows, counts, nodes, leaving[0], (rows, *by_row), tuple(whole), tuple(stacked))


def _arguments(node: fx.Node) -> list[fx.Node]:
    """Inputs of a call, without the `counts` of grouped operators."""
    return list(node.all_input_nodes) if node.target not in GROUPED else list(expert_arguments(node).values())


def expert_arguments(node: fx.Node) -> dict[str, fx.Node]:
    """Arguments of a grouped operator that its form for one expert takes, by name."""
    return {name: arg for name, arg in arguments(node).items() if name != "counts" and isinstance(arg, fx.Node)}


def _check_apart(node: fx.Node, shapes: Shapes, copies: int | str) -> None:
    """Raise FxquantError for a call whose result for one of the `copies` rows may depend on another row."""
    for meta in shapes.outputs(node):
        if meta.number:
            apart = all(user.target in SHAPE_OPERATORS for user in node.users)
        else:
            apart = meta.dims[:1] == (copies,) and None not in meta.fixed[1:]
        if node.target in ALONG_A_DIMENSION:
            apart = apart and int(operand(node, "dim")) % len(meta.dims) != 0
        if not apart:
            place = f"{node.name} ({node.meta.get('module') or 'the model'})"
            raise FxquantError(place, f"{node.target} mixes the rows of several experts.", ONE_EXPERT)
