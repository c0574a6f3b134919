"""The container of a graph: nodes, and a tensor on meta for each parameter. It has no forward and makes no code.

`fx.GraphModule` writes Python text for its graph, names and targets in it, and executes that text. A graph here may
come from a file, so nothing is ever generated: `fxquant.runtime.execute` and `fxquant.runtime.stream` call its
operators one by one.
"""

import copy
from typing import Any

from torch import Tensor, fx


class ProgramGraph:
    """`graph`, and what its `get_attr` nodes name: `tensors`, by target."""

    def __init__(self, graph: fx.Graph | None = None, tensors: dict[str, Tensor] | None = None) -> None:
        self.graph = fx.Graph() if graph is None else graph
        self.tensors = {} if tensors is None else tensors

    def tensor(self, target: str) -> Tensor:
        """The parameter `target`, on meta."""
        return self.tensors[target]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """What the graph returns: logits, then the caches in layer order."""
        returned: Any = self.graph.output_node().args[0]
        return tuple(returned)

    def lint(self) -> None:
        """Raises RuntimeError for a node that reads a later one, or a parameter that is not there."""
        self.graph.lint()
        missing = [node.target for node in self.graph.find_nodes(op="get_attr") if node.target not in self.tensors]
        if missing:
            raise RuntimeError(f"parameter {missing[0]} is read and not there")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProgramGraph":
        """Nodes are copied; tensors, which hold no values, are shared."""
        copied = memo[id(self)] = ProgramGraph(tensors=dict(self.tensors))
        copied.graph = copy.deepcopy(self.graph, memo)
        return copied
