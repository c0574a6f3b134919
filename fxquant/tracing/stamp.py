"""Layer stamping: the graph of a model from that of its representative layers, copied for each other layer."""

from collections import ChainMap
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from fxquant.tracing.layers import FIRST_PAST, NotRepeatedError, Plan

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
"""Numbers that shapes are made of: the same in all layers, so they are not copied."""
Nodes = dict[fx.Node, fx.Node]


def stamp(short: fx.Graph, plan: Plan) -> fx.Graph:
    """`short`, whose calls carry `meta["module"]`, with one copy of a representative's calls for each layer.

    Raises NotRepeatedError if layers depend on each other by more than the one tensor that each passes on.
    """
    return _Stamp(short, plan).full()


class _Stamp:
    """`places` cut the calls: those before the layers, of each representative, and after the layers."""

    def __init__(self, short: fx.Graph, plan: Plan) -> None:
        self.plan, self.short, self.graph = plan, short, fx.Graph()
        self.places = self._cut([node for node in short.nodes if node.op == "call_function"])
        self.handed_on = [_handed_on(calls) for calls in self.places[1:-1]]
        self.shared: Nodes = {}
        self.own: list[Nodes] = [{} for _ in plan.positions]
        """Layer → node of its representative → its copy in this layer."""

    def full(self) -> fx.Graph:
        self._copy_parameters()
        self._copy_inputs()
        for node in self.places[0]:
            self.shared[node] = self._copy(node, self.shared)
        handed: Nodes = {}
        for layer, position in enumerate(self.plan.positions):
            value = self._copy_layer(layer, position, handed)
            # in the short graph the next layer reads the representative before its own, whichever layer that was
            handed = {self.handed_on[self._consumer(layer + 1) - 1]: value}
        after = ChainMap({}, handed, self.shared)
        for node in self.places[-1]:
            after[node] = self._copy(node, after)
        self._copy_output(after)
        return self.graph

    def _consumer(self, layer: int) -> int:
        """Position of the representative of `layer`, or behind all of them for what follows the layers."""
        return self.plan.positions[layer] if layer < len(self.plan.positions) else len(self.handed_on)

    def _cut(self, calls: list[fx.Node]) -> list[list[fx.Node]]:
        count = len(self.plan.representatives)
        layers = [self._layer(node.meta["module"]) for node in calls]
        inside = [number for number, layer in enumerate(layers) if layer is not None]
        if set(layers) - {None} != set(range(count)):
            raise NotRepeatedError("a layer leaves no calls")
        first, last = inside[0], inside[-1] + 1
        places = [-1] * first + [-1 if layer is None else layer for layer in layers[first:last]]
        if any(later < earlier for earlier, later in pairwise(places)):
            raise NotRepeatedError("calls of different layers are mixed")
        places += [count] * (len(calls) - last)
        return [
            [node for node, own in zip(calls, places, strict=True) if own == place] for place in range(-1, count + 1)
        ]

    def _layer(self, path: str) -> int | None:
        """The representative that `path` lies in."""
        if not path.startswith(self.plan.path + "."):
            return None
        return int(path.removeprefix(self.plan.path + ".").partition(".")[0])

    def _moved(self, path: str, layer: int) -> str:
        """A path in a representative as the path in `layer`."""
        rest = path.removeprefix(self.plan.path + ".").partition(".")[2]
        return ".".join(part for part in (self.plan.path, str(layer), rest) if part)

    def _copy_parameters(self) -> None:
        for node in self.short.find_nodes(op="get_attr"):
            position = self._layer(node.target)
            if position is None:
                self.shared[node] = self._create(node, node.target)
            for layer, own in enumerate(self.plan.positions):
                if own == position:
                    self.own[layer][node] = self._create(node, self._moved(node.target, layer))

    def _copy_inputs(self) -> None:
        inputs = self.short.find_nodes(op="placeholder")
        for node in inputs[:FIRST_PAST]:
            self.shared[node] = self._create(node, node.target)
        for layer, position in enumerate(self.plan.positions):
            node = inputs[FIRST_PAST + position]
            name = node.name.removesuffix(str(position))
            if name == node.name:
                raise NotRepeatedError("a latent cache is not named by its layer")
            self.own[layer][node] = self._create(node, f"{name}{layer}")
        first = inputs[FIRST_PAST]
        self.shared[first] = self.own[0][first]  # for sizes, which are read from the first input that has them

    def _copy_layer(self, layer: int, position: int, handed: Nodes) -> fx.Node:
        """Copy the calls of one layer; returns the node that it passes on."""
        own, first = self.own[layer], layer == self.plan.representatives[position]
        known = ChainMap(own, handed, self.shared)
        for node in self.places[position + 1]:
            size = isinstance(node.meta.get("val"), SIZES)
            if first or not size:  # sizes are those of the first layer in all its copies
                copied = self._copy(node, known)
                copied.meta["module"] = self._moved(node.meta["module"], layer)
                (self.shared if size else own)[node] = copied
        return own[self.handed_on[position]]

    def _copy_output(self, after: Mapping[fx.Node, fx.Node]) -> None:
        node = self.short.output_node()
        values = node.args[0]
        assert isinstance(values, list | tuple)
        copies = [after if layer is None else self.own[layer] for layer, _ in self.plan.outputs]
        places = [place for _, place in self.plan.outputs]
        results = [_known(nodes, values[place]) for nodes, place in zip(copies, places, strict=True)]
        self.graph.output(type(values)(results)).meta = dict(node.meta)

    def _copy(self, node: fx.Node, known: Mapping[fx.Node, fx.Node]) -> fx.Node:
        return self.graph.node_copy(node, lambda argument: _known(known, argument))

    def _create(self, node: fx.Node, target: str) -> fx.Node:
        created = self.graph.create_node(node.op, target, name=target if node.op == "placeholder" else None)
        created.meta = dict(node.meta)
        return created


def _known(known: Mapping[fx.Node, fx.Node], argument: Any) -> fx.Node:
    if argument not in known:
        raise NotRepeatedError(f"{argument} belongs to another layer")
    return known[argument]


def _handed_on(calls: list[fx.Node]) -> fx.Node:
    """The one result of a layer's calls that other calls read."""
    inside = set(calls)
    results = [
        node
        for node in calls
        if not isinstance(node.meta.get("val"), SIZES)
        and any(user.op == "call_function" and user not in inside for user in node.users)
    ]
    if len(results) != 1:
        raise NotRepeatedError("a layer passes on no tensor or several")
    return results[0]
