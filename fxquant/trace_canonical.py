"""One spelling for one meaning: torch's own linear, norm and embedding calls become `fxq::` operators."""

from collections.abc import Callable

import torch
from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.program import Program

ATEN = torch.ops.aten
PLACEMENT = ("device", "layout", "pin_memory")
"""Arguments that say where a tensor lies: meta while tracing, and the caller's business afterwards."""


def canonicalize(program: Program) -> None:
    """Rewrite known aten calls, drop what does nothing in inference, and remove dead nodes."""
    graph = program.graph.graph
    for node in list(graph.nodes):
        if node.op == "call_function":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key not in PLACEMENT}
        rewrite = REWRITES.get(node.target)
        if node.op == "call_function" and rewrite is not None:
            rewrite(graph, node)
    graph.eliminate_dead_code(is_impure_node=_has_effect)


def _has_effect(node: fx.Node) -> bool:
    """Inputs and outputs stay; shape assertions of torch.export go, the dialect's own verifier repeats them."""
    return node.op in ("placeholder", "output")


def _replace(node: fx.Node, target: Callable, args: tuple) -> None:
    node.target, node.args, node.kwargs = target, args, {}


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    _replace(node, ops.linear, tuple(node.args))


def _embedding(graph: fx.Graph, node: fx.Node) -> None:
    _replace(node, ops.embedding, tuple(node.args[:2]))


def _rms_norm(graph: fx.Graph, node: fx.Node) -> None:
    """Only the form that normalizes the last dimension and has a weight; torch's default eps is that of float32."""
    x, shape, weight, eps = (*node.args, None, None)[:4]
    if isinstance(shape, list | tuple) and len(shape) == 1 and weight is not None:
        _replace(node, ops.rms_norm, (x, weight, torch.finfo(torch.float32).eps if eps is None else eps))


def _read_value(graph: fx.Graph, node: fx.Node) -> None:
    place = node.meta.get("module") or "the model"
    raise FxquantError(place, "its forward reads a tensor's value (item()).", "Keep control flow free of values.")


def _identity(graph: fx.Graph, node: fx.Node) -> None:
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)


REWRITES = {
    ATEN.item.default: _read_value,
    ATEN._local_scalar_dense.default: _read_value,
    ATEN.linear.default: _linear,
    ATEN.embedding.default: _embedding,
    ATEN.rms_norm.default: _rms_norm,
    ATEN.dropout.default: _identity,
    ATEN.contiguous.default: _identity,
    ATEN.alias.default: _identity,
    ATEN.clone.default: _identity,
}
