"""Block walk: runs the rewritten graph on the stored weights, with all values of one block at a time."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.processes.memory import return_freed_memory
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs, cache_shape, call
from fxquant.runtime.weight_providers import Read, load

BATCH, SEQUENCE, PAST = 2, 12, 5


def probe_inputs(program: Program, seed: int = 0) -> dict[str, Any]:
    """Graph input name → value: two rows of random tokens over a random cache, the second row left-padded."""
    generator = torch.Generator().manual_seed(seed)
    total = PAST + SEQUENCE
    mask = torch.ones(BATCH, total, dtype=torch.int64)
    mask[1, :2] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, PAST:]
    ids = torch.randint(0, program.config["vocab_size"], (BATCH, SEQUENCE), generator=generator)
    names = [node.name for node in program.graph.graph.nodes if node.op == "placeholder"][:3]
    values = dict(zip(names, (ids, mask, positions), strict=True))
    for node in cache_inputs(program):
        values[node.name] = torch.randn(cache_shape(node.meta["val"], BATCH, PAST), generator=generator)
    return values


def block_names(program: Program) -> list[str]:
    """The blocks of the graph, in order."""
    calls = (node for node in program.graph.graph.nodes if node.op == "call_function")
    return list(dict.fromkeys(node.meta["block"] for node in calls))


def one_of_each_kind(program: Program) -> list[str]:
    """The first block of each sequence of operators."""
    first: dict[tuple, str] = {}
    for block in block_names(program):
        nodes = program.graph.graph.nodes
        operators = tuple(str(n.target) for n in nodes if n.op == "call_function" and n.meta["block"] == block)
        first.setdefault(operators, block)
    return list(first.values())


def walk(program: Program, read: Read, selected: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """For each selected block its name and all values that its nodes read or compute, by node name.

    Other blocks do not run: the values that later blocks need of them are replaced by the latest value of the same
    traced shape, so that a sample of a large model costs a sample's time.
    """
    values: dict[fx.Node, Any] = {}
    inputs = probe_inputs(program)
    nodes = [node for node in program.graph.graph.nodes if node.op != "output"]
    last_use = {argument: node for node in nodes for argument in node.all_input_nodes}
    for block in block_names(program):
        own = [node for node in nodes if node.op == "call_function" and node.meta["block"] == block]
        if block in selected:
            with torch.no_grad():  # as a decorator of a generator it would keep the last block's values
                _run(program, read, own, values, inputs)
            reads = {argument for node in own for argument in node.all_input_nodes}
            yield block, {node.name: values[node] for node in {*own, *reads} if node in values}
        else:
            _substitute(own, values, last_use)
        position = {node: index for index, node in enumerate(nodes)}
        end = position[own[-1]]
        for node in [n for n in values if n.op != "placeholder" and position.get(last_use.get(n, n), 0) <= end]:
            del values[node]


def _run(program: Program, read: Read, own: list[fx.Node], values: dict[fx.Node, Any], inputs: dict[str, Any]) -> None:
    for node in own:
        for argument in node.all_input_nodes:
            if argument.op == "placeholder":
                values[argument] = inputs[argument.name]
            elif argument.op == "get_attr" and argument not in values:
                values[argument] = load(program, str(argument.target), read)
        values[node] = call(node, values.__getitem__)
    return_freed_memory()


def _substitute(own: list[fx.Node], values: dict[fx.Node, Any], last_use: dict[fx.Node, fx.Node]) -> None:
    members = set(own)
    for node in own:
        leaves = last_use.get(node) is not None and last_use[node] not in members
        if leaves and isinstance(node.meta["val"], Tensor):
            # a block is checked on its own inputs: any values do; no model has the traced dynamic sizes: shapes fit
            shape = tuple(node.meta["val"].shape)
            same = [n for n in values if isinstance(n.meta.get("val"), Tensor) and tuple(n.meta["val"].shape) == shape]
            values[node] = values[same[-1]]
