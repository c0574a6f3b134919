"""Node builder: adds nodes to a program, named, before a given node, with metadata and a checked shape."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._guards import detect_fake_mode

from fxquant.program.node_names import identifier, rename
from fxquant.program.program import Parameter, Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, graph_spec


class Surgery:
    """Creates nodes before `site`, with its module, kind and block; `rules` cache shapes."""

    def __init__(self, program: Program, site: fx.Node, rules: ShapeRules | None = None) -> None:
        self.program, self.site, self.rules = program, site, rules or ShapeRules()
        self.graph = program.graph.graph

    def call(self, target: Any, args: Sequence[Any], name: str) -> fx.Node:
        """A call of `target`, whose shape rule runs on the arguments at once."""
        with self.graph.inserting_before(self.site):
            node = self.graph.create_node("call_function", target, tuple(args))
        values = fx.map_arg(node.args, lambda n: n.meta["val"])
        return self._finish(node, name, self.rules.call(target, values))

    def outputs(self, node: fx.Node, names: Sequence[str]) -> list[fx.Node]:
        """One getitem per output of a call that returns a tuple."""
        return [self.call(operator.getitem, (node, index), name) for index, name in enumerate(names)]

    def parameter(self, recipe: Recipe, role: str) -> fx.Node:
        """The `get_attr` of a tensor that `recipe` owns, stacked [experts, …] for routed experts."""
        target = tensor_name(recipe.module, role)
        spec = graph_spec(recipe, role)
        kind = self.site.meta["kind"]
        stacked = recipe.modules != (recipe.module,)
        shape = (len(recipe.modules), *spec.shape) if stacked else spec.shape
        names = tuple(tensor_name(module, role) for module in recipe.modules)
        tensor = torch.empty(shape, dtype=spec.dtype, device="meta")
        return self.attach(target, tensor, Parameter(names, recipe.module, kind, role, stacked))

    def attach(self, target: str, tensor: torch.Tensor, parameter: Parameter) -> fx.Node:
        """The `get_attr` of a new parameter, `tensor` on meta."""
        self.program.add_parameter(target, tensor, parameter)
        for old in self.site.all_input_nodes:
            if old.op == "get_attr" and old.target == target:
                # a quantized weight has the target of the float one, whose node is dropped once nothing reads it
                self.program.names.discard(old.name)
                rename(self.program.names, old, f"{old.name}_float")
        with self.graph.inserting_before(self.site):
            node = self.graph.create_node("get_attr", target)
        # a fresh trace holds fake tensors, and an operator refuses to mix them with others
        mode = detect_fake_mode([n.meta["val"] for n in self.site.all_input_nodes])
        return self._finish(node, identifier(target), self.rules.fake(tensor, mode) if mode else tensor)

    def replace(self, node: fx.Node) -> None:
        """Give `node` the name and the users of the site, and erase the site."""
        name = self.site.name
        self.site.replace_all_uses_with(node)
        self.graph.erase_node(self.site)
        self.program.names.discard(node.name)
        node.name = name

    def _finish(self, node: fx.Node, name: str, value: Any) -> fx.Node:
        rename(self.program.names, node, name)
        node.meta |= {key: self.site.meta[key] for key in ("module", "kind", "block")} | {"val": value}
        return node
