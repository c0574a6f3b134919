"""Canonicalization: torch's own linear, norm and embedding calls become `fxq::` operators."""

from collections.abc import Callable

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.program.operands import arguments, operand

ATEN = torch.ops.aten
PLACEMENT = ("device", "layout", "pin_memory")
"""Arguments for the placement of a tensor: meta while tracing, the caller's choice afterwards."""


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite known aten calls, drop calls that do nothing in inference, and remove dead nodes.

    Each size is read once, from the first input that has it. Of two tensors that are added or multiplied, the one made
    earlier comes first, and a parameter last.
    """
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in PLACEMENT}
        rewrite = REWRITES.get(node.target)
        if node.op == "call_function" and rewrite is not None:
            rewrite(graph, node)
    _share_sizes(graph)
    graph.eliminate_dead_code(is_impure_node=_has_effect)
    _order_operands(graph)


def _has_effect(node: fx.Node) -> bool:
    """Inputs and outputs stay. Shape assertions of torch.export are dropped: the dialect's verifier repeats them."""
    return node.op in ("placeholder", "output")


def _share_sizes(graph: fx.Graph) -> None:
    """Merge calls that give the same size into the first; torch.export reads a size from any input that has it."""
    first_with: dict[str, tuple[fx.Node, int]] = {}
    for node in graph.find_nodes(op="placeholder"):
        for dimension, size in enumerate(node.meta["val"].shape):
            if isinstance(size, torch.SymInt):
                first_with.setdefault(str(size), (node, dimension))
    first: dict[str, fx.Node] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "call_function" or not isinstance(value, torch.SymInt):
            continue
        if node.target == ATEN.sym_size.int:
            node.args = first_with.get(str(value), node.args)
        same = first.setdefault(str(value), node)
        if same is not node:
            node.replace_all_uses_with(same)


def _order_operands(graph: fx.Graph) -> None:
    # models write x + y and y + x for the same sum: their structural hashes must be equal
    position = {node: index for index, node in enumerate(graph.nodes)}
    for node in graph.nodes:
        if node.target in COMMUTATIVE and not node.kwargs and all(map(_is_tensor, node.args)):
            computed = (argument for argument in node.args if argument.op != "get_attr")
            held = (argument for argument in node.args if argument.op == "get_attr")
            node.args = (
                *sorted(computed, key=position.__getitem__),
                *sorted(held, key=lambda parameter: str(parameter.target)),
            )


def order_parameters(graph: fx.Graph) -> None:
    """Move parameters to the front, in the order in which calls first read them, however the model lists them."""
    read = dict.fromkeys(
        argument for node in graph.nodes for argument in node.all_input_nodes if argument.op == "get_attr"
    )
    for node in reversed(read):
        next(iter(graph.nodes)).prepend(node)


def _is_tensor(argument: object) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), Tensor)


def _replace(node: fx.Node, target: Callable, args: tuple) -> None:
    node.target, node.args, node.kwargs = target, args, {}


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    _replace(node, ops.linear, tuple(node.args))


def _embedding(graph: fx.Graph, node: fx.Node) -> None:
    _replace(node, ops.embedding, (operand(node, "weight"), operand(node, "indices")))


def _rms_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Only the form that normalizes the last dimension and has a weight; torch's default eps is float32's."""
    given = arguments(node)
    weight, eps = given["weight"], given["eps"]
    if len(given["normalized_shape"]) == 1 and weight is not None:
        _replace(node, ops.rms_norm, (given["input"], weight, torch.finfo(torch.float32).eps if eps is None else eps))


def _read_value(graph: fx.Graph, node: fx.Node) -> None:
    place = node.meta.get("module") or "the model"
    fact = "its forward reads a tensor's value (item())."
    raise FxquantError(place, fact, "Keep control flow free of tensor values.")


def _reshape(graph: fx.Graph, node: fx.Node) -> None:
    """A view depends on how its argument lies in memory, which a graph does not say."""
    _replace(node, ATEN.reshape.default, tuple(node.args))


def _view_as_real(graph: fx.Graph, node: fx.Node) -> None:
    """Of numbers that are a view of pairs: these pairs."""
    made = node.all_input_nodes[0]
    if made.target == ATEN.view_as_complex.default:
        node.replace_all_uses_with(made.all_input_nodes[0])
        graph.erase_node(node)


def _dropout(graph: fx.Graph, node: fx.Node) -> None:
    """Nothing in inference; one that is left on draws random numbers, and stays."""
    given = arguments(node)
    if not given["train"] or given["p"] == 0:
        _identity(graph, node)


def _identity(graph: fx.Graph, node: fx.Node) -> None:
    node.replace_all_uses_with(node.all_input_nodes[0])
    graph.erase_node(node)


REWRITES = {
    ATEN.item.default: _read_value,
    ATEN._local_scalar_dense.default: _read_value,
    ATEN.linear.default: _linear,
    ATEN.embedding.default: _embedding,
    ATEN.rms_norm.default: _rms_norm,
    ATEN.dropout.default: _dropout,
    ATEN.view_as_real.default: _view_as_real,
    ATEN.view.default: _reshape,
    ATEN._unsafe_view.default: _reshape,
    ATEN.contiguous.default: _identity,
    ATEN.alias.default: _identity,
    ATEN.clone.default: _identity,
}
COMMUTATIVE = (ATEN.add.Tensor, ATEN.mul.Tensor)
"""a op b is b op a, bit for bit."""
