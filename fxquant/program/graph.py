"""Graph container: nodes, and a meta tensor per parameter. It has no forward and generates no code.

`fx.GraphModule` generates Python code from its graph, names and targets included, and executes it. A graph here may
come from a file, so no code is ever generated: `fxquant.runtime.execute` and `fxquant.runtime.stream` call its
operators one by one.
"""

import copy
from typing import Any

from torch import Tensor, fx


class ProgramGraph:
    """`graph`, and `tensors`: target → the tensor that `get_attr` nodes read, on meta."""

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
        """Raises RuntimeError for a node that reads a later one, or a missing parameter."""
        self.graph.lint()
        missing = [node.target for node in self.graph.find_nodes(op="get_attr") if node.target not in self.tensors]
        if missing:
            raise RuntimeError(f"parameter {missing[0]} is read but missing")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ProgramGraph":
        """Nodes are copied; tensors, which hold no values, are shared."""
        copied = memo[id(self)] = ProgramGraph(tensors=dict(self.tensors))
        copied.graph = copy.deepcopy(self.graph, memo)
        return copied
