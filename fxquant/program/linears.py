"""Linear sites: queries of the graph about its linears, for passes."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fxquant import ops
from fxquant.policy.kinds import Kind
from fxquant.policy.unused_rules import Decided
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Pair, Parameter, Program

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""Stacked weights of `fxq::moe_experts`, by the names of its arguments."""
WEIGHTS: dict[Any, tuple[str, ...]] = {ops.linear: ("weight",), ops.moe_experts: PROJECTIONS}
"""Operator → its arguments that are weights to quantize."""
READS: dict[Any, tuple[str, ...]] = {
    ops.linear: ("weight",),
    ops.router_logits: ("weight",),
    ops.moe_experts: ("gate_proj", "up_proj"),
}
"""Operator → its arguments that are weights [n, k] by which `x` [..., k] is multiplied."""
MAKE_FEATURES = {ops.swiglu, ops.mla_attention}
MIX = {ops.linear, ops.moe_experts, ops.embedding}
"""They mix the features that they read, so their results are not features of the block any more."""


@dataclass(frozen=True)
class LinearSite:
    """One quantizable weight: the node that multiplies by it, and which feature axis a deployment may split."""

    node: fx.Node
    weight: fx.Node
    parameter: Parameter
    bias: fx.Node | None
    row_parallel: bool

    @property
    def module(self) -> str:
        """Graph module path."""
        return self.parameter.module

    @property
    def kind(self) -> Kind:
        """Kind of the module that owns the weight."""
        return self.parameter.kind


def linear_sites(program: Program) -> Iterator[LinearSite]:
    """Every linear whose weight is a parameter, in graph order.

    It is row parallel if it reads features of its block: going back from its input, an attention or a swiglu comes
    before any other linear. Tensor parallelism splits such a linear along in_features.
    """
    made_by_block: set[fx.Node] = set()
    for node in program.graph.graph.nodes:
        reads_features = not made_by_block.isdisjoint(node.all_input_nodes)
        if node.target in MAKE_FEATURES or (reads_features and node.target not in MIX):
            made_by_block.add(node)
        if node.target == ops.linear and is_parameter(operand(node, "weight")):
            weight, row_parallel = operand(node, "weight"), operand(node, "x") in made_by_block
            yield LinearSite(node, weight, program.parameter(weight), operand(node, "bias"), row_parallel)
        elif node.target == ops.moe_experts:
            for name in PROJECTIONS:
                weight = operand_node(node, name)
                yield LinearSite(node, weight, program.parameter(weight), None, name == "down_proj")


def is_parameter(value: object) -> bool:
    """Whether an argument is read from the weight file."""
    return isinstance(value, fx.Node) and value.op == "get_attr"


def reads(user: fx.Node, value: fx.Node) -> bool:
    """Whether `user` multiplies `value` by parameters, and does nothing else with it."""
    names = READS.get(user.target, ())
    return bool(names) and operand(user, "x") is value and all(is_parameter(operand(user, name)) for name in names)


def not_scalable(node: fx.Node, maker: fx.Node, weights: Counter[str]) -> str | None:
    """Why the value of `node`, whose scale the weight of `maker` sets, cannot be scaled; None if it can."""
    if not node.users or not all(reads(user, node) for user in node.users):
        return "not only linears read it"
    if maker is not node and (maker.target != ops.linear or set(maker.users) != {node}):
        return "its values do not come from one linear"
    if not is_parameter(operand(maker, "weight")):
        return "the weight before it is computed, not a parameter"
    shared = [str(operand_node(maker, "weight").target)]
    for user in node.users:
        shared += [str(operand_node(user, name).target) for name in READS[user.target]]
    return None if all(weights[name] == 1 for name in shared) else "a weight before or after it is used elsewhere too"


def experts_not_scalable(node: fx.Node, weights: Counter[str]) -> str | None:
    """Why the values between up_proj and down_proj of a `fxq::moe_experts` cannot be scaled; None if they can."""
    operands = [operand(node, name) for name in ("up_proj", "down_proj")]
    if not all(map(is_parameter, operands)):
        return "a weight of its experts is computed, not a parameter"
    return None if all(weights[str(weight.target)] == 1 for weight in operands) else "its experts share weights"


def weight_uses(program: Program) -> Counter[str]:
    """Graph target → how many nodes read it."""
    return Counter(str(node.target) for node in program.graph.graph.nodes if node.op == "get_attr")


def decided_modules(program: Program) -> list[Decided]:
    """Every module that a rule decided, in graph order: one entry per parameter, then the prediction layers."""
    linears = {module for site in linear_sites(program) for module in (site.module, _bias_module(program, site))}
    modules = []
    for parameter in program.parameters.values():
        members = parameter.names if parameter.stacked else ()
        modules.append(
            Decided(
                parameter.module, parameter.kind, parameter.module in linears, program.rules[parameter.module], members
            )
        )
    return modules + [Decided(path, Kind.MTP, True, program.rules[path]) for path in program.mtp.layers]


def _bias_module(program: Program, site: LinearSite) -> str:
    return program.parameter(site.bias).module if site.bias is not None else site.module


def pair_consumers(program: Program, pair: Pair) -> Iterator[str]:
    """Checkpoint names of every weight that reads the pair's value."""
    for target in pair.consumers:
        yield from program.parameters[target].names
