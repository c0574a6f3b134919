"""Block-wise runner: runs the nodes that some nodes need, block by block over all batches; only live values stay."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.ops.library import REFERENCES
from fxquant.program.linears import PROJECTIONS
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.progress import Advance
from fxquant.runtime.execute import Observer, Values, call, last_uses, of_batch
from fxquant.runtime.weight_providers import CPU, LazyStack, Read, load

Prepare = Callable[[fx.Node, Values], None]
"""Called with a call node and all live values."""


@dataclass(frozen=True)
class Block:
    """Consecutive calls of one block of the graph, of those that run."""

    name: str
    nodes: tuple[fx.Node, ...]


class Stream:
    """A run of only the nodes that `wanted` depends on.

    Each weight is loaded to `device` as float32, once for all batches, and dropped after its last use; the experts of a
    layer run over the tokens of all batches together, each read once. Other values live until their last use: between
    blocks, these are the hidden states. `batches` are flat inputs in the order of the placeholders.

    blocks  what runs, in order
    values  node → value for each batch, of all live calls and placeholders
    kept    calls whose values stay after their last use, for another stream
    handed  placeholders that `restore` gives values, of another stream; `batches` end before them
    """

    def __init__(
        self,
        program: Program,
        read: Read,
        batches: Sequence[Sequence[Tensor]],
        results: Collection[fx.Node],
        device: torch.device = CPU,
        kept: Collection[fx.Node] = (),
        handed: Collection[fx.Node] = (),
    ) -> None:
        self._program, self._read, self._count, self._device = program, read, len(batches), device
        self._handed = frozenset(handed)
        needed = needed_nodes(program.graph.graph, [*results, *kept])
        calls = [node for node in needed if node.op == "call_function"]
        self._dead = {
            node: [dead for dead in all_dead if dead not in kept] for node, all_dead in last_uses(calls).items()
        }
        self.blocks = [Block(name, tuple(nodes)) for name, nodes in groupby(calls, lambda node: node.meta["block"])]
        placeholders = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
        self.values: dict[fx.Node, list[Any]] = {
            node: [batch[place].to(device) for batch in batches]
            for place, node in enumerate(placeholders)
            if node in needed and node not in self._handed
        }

    @torch.no_grad()
    def run(self, block: Block, observe: Observer, advance: Advance, prepare: Prepare | None = None) -> None:
        """Run the next block; `observe` sees each of its calls, with its inputs still alive, `prepare` before it
        runs: experts that it changes are read changed."""
        values = self.values
        for node in block.nodes:
            for argument in node.all_input_nodes:
                if argument.op == "get_attr" and argument not in values:
                    weight = load(self._program, str(argument.target), self._read, device=self._device)
                    values[argument] = [weight] * self._count
            if prepare:
                prepare(node, values)
            values[node] = self._call(node)
            observe(node, values[node], values)
            for dead in self._dead.get(node, ()):
                values.pop(dead, None)
            advance(1)
        for node in self.live():  # a resumed run reads these from a file: both must sum in the same order
            values[node] = [settled(value) for value in values[node]]

    def live(self) -> list[fx.Node]:
        """The calls and handed inputs whose values are live: with the batches, all that later blocks depend on."""
        return [node for node in self.values if node.op == "call_function" or node in self._handed]

    def skip(self, blocks: int) -> list[fx.Node]:
        """Resume after a number of blocks that ran earlier; returns the nodes that `restore` must then give values."""
        self.values |= {node: [] for node in self._handed}
        for block in self.blocks[:blocks]:
            for node in block.nodes:
                # without values: only which ones are live after these blocks matters
                self.values |= {argument: [] for argument in node.all_input_nodes if argument.op == "get_attr"}
                self.values[node] = []
                for dead in self._dead.get(node, ()):
                    self.values.pop(dead, None)
        return self.live()

    def restore(self, node: fx.Node, values: list[Any]) -> None:
        """Give a call that was skipped, or a handed input, its value for each batch."""
        self.values[node] = [_moved(value, self._device) for value in values]

    def _call(self, node: fx.Node) -> list[Any]:
        if node.target == ops.moe_experts and isinstance(self.values[operand_node(node, "gate_proj")][0], LazyStack):
            return experts_together(node, self.values)
        return [call(node, of_batch(self.values, i)) for i in range(self._count)]


def needed_nodes(graph: fx.Graph, results: Collection[fx.Node]) -> dict[fx.Node, None]:
    """`results` and all that they depend on, in graph order."""
    needed = set(results)
    for node in reversed(graph.nodes):
        if node in needed:
            needed.update(node.all_input_nodes)
    return dict.fromkeys(node for node in graph.nodes if node in needed)


def experts_together(node: fx.Node, values: Values) -> list[Tensor]:
    """Run `fxq::moe_experts` once over the tokens of all batches, in their order; returns the value of each batch."""
    tokens = [values[operand_node(node, name)] for name in ("x", "ids", "weights")]
    stacks = [values[operand_node(node, name)][0] for name in PROJECTIONS]
    rows = [torch.cat([value.flatten(0, -2) for value in batches]) for batches in tokens]
    shapes = [value.shape for value in tokens[0]]
    parts = REFERENCES[ops.moe_experts](*rows, *stacks).split([shape[:-1].numel() for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def settled(value: Any) -> Any:
    """The same numbers in the memory layout of a tensor read from a file: sums may depend on the layout."""
    if isinstance(value, list | tuple):
        return type(value)(map(settled, value))
    return value.contiguous() if isinstance(value, Tensor) else value


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value
