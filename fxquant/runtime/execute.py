"""Node-wise runner: a program on CPU, node by node over all batches at once, with one node's weights in memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.processes.memory import lacks_memory
from fxquant.program.program import Program
from fxquant.progress import Advance
from fxquant.runtime.weight_providers import LazyStack, Read, load

REMEDY = "The graph does not fit its weights or inputs: check them, or compile again."
Values = Mapping[fx.Node, list[Any]]
"""Node → its value for each batch; a parameter's value, or its `LazyStack`, is repeated for each batch."""
Observer = Callable[[fx.Node, list[Any], Values], None]
"""Called with a call node, its values, which it may replace, and all live values: at least the node's inputs."""


@torch.no_grad()
def execute(
    program: Program,
    read: Read,
    batches: Sequence[Sequence[Tensor]],
    observe: Observer | None = None,
    advance: Advance | None = None,
    dtype: torch.dtype = torch.float32,
    known: Mapping[fx.Node, list[Any]] | None = None,
) -> list:
    """Outputs of each batch of flat inputs, in the order of the graph's placeholders.

    Each weight is read once for all batches and dropped after its last use; a stack of experts is read expert by
    expert. `observe` sees every call with its value for each batch. `dtype` is that of the float weights and caches.
    `known` gives the values of some calls for each batch: these, and calls that only they need, do not run.
    """
    values: dict[fx.Node, list[Any]] = dict(known or {})
    placeholders = 0
    nodes = _needed(program.graph.graph, values) if values else list(program.graph.graph.nodes)
    last_use = last_uses(nodes)
    for node in nodes:
        if advance:
            advance(1)
        if node.op == "placeholder":
            values[node] = [batch[placeholders] for batch in batches]
            placeholders += 1
        elif node.op == "output":
            return [fx.map_arg(program.graph.results, of_batch(values, i)) for i in range(len(batches))]
        elif node.op == "call_function":
            for argument in node.all_input_nodes:
                if argument.op == "get_attr" and argument not in values:
                    values[argument] = [load(program, str(argument.target), read, dtype)] * len(batches)
            values[node] = [call(node, of_batch(values, i)) for i in range(len(batches))]
            if observe:
                observe(node, values[node], values)
        for dead in last_use.get(node, ()):
            values.pop(dead, None)
    raise AssertionError("a graph ends in an output node")


def call(node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    """The result of one call node, with `value` giving its inputs. Raises FxquantError if they do not fit."""
    args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    # torch's dispatcher takes tensors only: a lazy stack goes to the operator's Python function
    lazy = any(isinstance(arg, LazyStack) for arg in args)
    try:
        function: Any = ops.REFERENCES[node.target] if lazy else node.target  # type: ignore[index]
        return function(*args, **kwargs)
    except (RuntimeError, LookupError, ValueError, TypeError, ArithmeticError) as error:
        if lacks_memory(error):
            raise
        line = (str(error).strip() or type(error).__name__).split("\n")[0][:500]
        raise FxquantError(node.meta.get("module") or node.name, f"{node.name}: {line}.", REMEDY) from error


def of_batch(values: Values, index: int) -> Callable[[fx.Node], Any]:
    """Node → its value for one batch, as `call` takes it."""
    return lambda node: values[node][index]


def _needed(graph: fx.Graph, known: Mapping[fx.Node, Any]) -> list[fx.Node]:
    """Inputs, output, and the calls that the output needs beyond `known`, in graph order."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or (node in needed and node not in known):
            needed.update(node.all_input_nodes)
    always = ("placeholder", "output")
    return [node for node in graph.nodes if node.op in always or (node in needed and node not in known)]


def last_uses(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node → nodes whose value is not needed after it, if only `nodes` run, in this order."""
    nodes = list(nodes)
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        for argument in node.all_input_nodes:
            last[argument] = node
    dead: dict[fx.Node, list[fx.Node]] = {}
    for argument, node in last.items():
        dead.setdefault(node, []).append(argument)
    for node in nodes:
        if node not in last and node.op in ("call_function", "get_attr", "placeholder"):
            dead.setdefault(node, []).append(node)
    return dead


def prefill_inputs(
    program: Program, ids: Tensor, dtype: torch.dtype = torch.float32, mask: Tensor | None = None
) -> list[Tensor]:
    """Flat inputs for `ids` int64 [batch, length] and empty caches.

    `mask` int64 [batch, length] is 0 on padding, which comes after the tokens; None: no padding.
    """
    batch, length = ids.shape
    caches = [node.meta["val"] for node in cache_inputs(program)]
    positions = torch.arange(length).expand(batch, length)
    mask = torch.ones_like(ids) if mask is None else mask
    return [ids, mask, positions, *(torch.zeros(cache_shape(val, batch, 0), dtype=dtype) for val in caches)]


def cache_inputs(program: Program) -> list[fx.Node]:
    """The placeholders of the caches, in layer order."""
    return [node for node in program.graph.graph.nodes if node.op == "placeholder"][3:]


def cache_shape(traced: Tensor, batch: int, past: int) -> list[int]:
    """Shape of a cache: rows first, tokens last but one, as in [B, T, width] and [B, H, T, width]."""
    return [batch, *traced.shape[1:-2], past, traced.shape[-1]]
