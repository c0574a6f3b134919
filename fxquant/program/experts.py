"""Experts: queries of the graph about the projections of routed experts, float or quantized."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxquant import ops
from fxquant.program.linears import PROJECTIONS
from fxquant.program.operands import item_of, operand_node
from fxquant.program.program import Program
from fxquant.schemes.schemes import Recipe


@dataclass(frozen=True)
class ExpertRecipes:
    """Recipes of the three projections of a layer's routed experts."""

    gate: Recipe
    up: Recipe
    down: Recipe

    @property
    def all(self) -> tuple[Recipe, Recipe, Recipe]:
        """In the order of the computation."""
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class QuantizedExperts:
    """Nodes of routed experts in the quantized dialect.

    routing         `moe_init_routing`
    gate, up, down  `grouped_dequantize` of each projection
    """

    routing: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node

    def weights(self) -> tuple[fx.Node, ...]:
        """Parameters of the three weights."""
        return tuple(operand_node(operand_node(node, "acc"), "weight") for node in (self.gate, self.up, self.down))


def quantized_experts(finalize: fx.Node) -> QuantizedExperts | None:
    """What `finalize`, a `moe_finalize_routing`, sums: down(swiglu(gate, up)) of sorted rows; None for all else."""
    down = operand_node(finalize, "rows")
    hidden = _rows_of(down)
    if hidden is None or hidden.target != ops.swiglu:
        return None
    gate, up = operand_node(hidden, "gate"), operand_node(hidden, "up")
    routed = _rows_of(gate)
    if routed is None or routed is not _rows_of(up):
        return None
    routing, index = item_of(routed)
    if routing.target != ops.moe_init_routing or index != 0:
        return None
    return QuantizedExperts(routing, gate, up, down)


def expert_recipes(program: Program) -> Iterator[ExpertRecipes]:
    """One for each `moe_experts`, or rewritten form of one, whose projections all have recipes."""
    for node in program.graph.graph.nodes:
        modules = _modules(node, program)
        if modules and all(module in program.recipes for module in modules):
            yield ExpertRecipes(*(program.recipes[module] for module in modules))


def _modules(node: fx.Node, program: Program) -> list[str]:
    if node.target == ops.moe_experts:
        return [program.parameter(operand_node(node, name)).module for name in PROJECTIONS]
    experts = quantized_experts(node) if node.target == ops.moe_finalize_routing else None
    return [] if experts is None else [program.parameter(weight).module for weight in experts.weights()]


def _rows_of(result: fx.Node) -> fx.Node | None:
    """The float rows behind a product of integers over rows sorted by expert."""
    if result.target != ops.grouped_dequantize:
        return None
    quantize, _ = item_of(operand_node(operand_node(result, "acc"), "x"))
    return operand_node(quantize, "x") if quantize.target == ops.quantize_per_token else None
