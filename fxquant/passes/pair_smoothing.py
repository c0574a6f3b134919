"""SmoothQuant pairs, found in the graph: norm(x) → linears, linear(x) → attention → linear, and up_proj(x) → swiglu →
down_proj, of a dense MLP or of each expert: silu(gate) * up is linear in up.

The value between them becomes `(value - shift) / scale`, and the weights on both sides compensate for it, see
`fxquant.transforms.weight_transforms`. This pass gives pairs their rules, and shifts their place: a bias of the norm
and of each linear. Calibration finds the numbers.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.passes.base import Pass, PassResult
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import Policy
from fxquant.policy.smooth_rules import PairKind, SmoothMethod, SmoothRule
from fxquant.policy.unused_smoothing import SeenValue
from fxquant.program.linears import (
    READS,
    decided_modules,
    experts_not_scalable,
    is_parameter,
    not_scalable,
    weight_uses,
)
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import operand, operand_node, set_operand
from fxquant.program.program import Pair, Program
from fxquant.schemes.roles import tensor_name

PAIRS: dict[Any, PairKind] = {
    ops.rms_norm: PairKind.NORM,
    ops.mla_attention: PairKind.LINEAR,
    ops.swiglu: PairKind.SWIGLU,
    ops.moe_experts: PairKind.SWIGLU,
}
"""Operator whose value may be smoothed → what makes it."""


@dataclass
class PairSmoothing(Pass):
    """Fills `program.pairs`, and gives norms and linears the biases that their methods need.

    Raises FxquantError for a rule that matches no pair, and for a shift that a consumer has no bias to compensate.
    """

    policy: Policy
    used: set[SmoothRule] = field(default_factory=set)
    values: list[SeenValue] = field(default_factory=list)
    name = "pair-smoothing"

    def apply(self, program: Program) -> PassResult:
        skipped: dict[str, str] = {}
        weights = weight_uses(program)
        for node in list(program.graph.graph.nodes):
            if node.target in PAIRS:
                reason = self._pair(program, node, weights)
                skipped |= {node.name: reason} if reason else {}
        if self.policy.norm_bias == "every":
            for node in program.nodes(ops.rms_norm):
                _give_norm_bias(program, node)
        self.policy.check_smooth_rules(self.used, self.values, lambda: decided_modules(program))
        return PassResult(self.name, tuple(pair.value.name for pair in program.pairs), skipped)

    def _pair(self, program: Program, node: fx.Node, weights: Counter[str]) -> str | None:
        kind, (maker, weight) = PAIRS[node.target], _maker(node)
        consumers = _consumers(node)
        modules = _modules(program, [name for _, name in consumers])
        quantized = [(module, kind) for module, kind in modules if module in program.recipes]
        reason = _why_no_pair(node, maker, weights)
        if reason is None and program.mtp.stored and any(kind is Kind.HEAD for _, kind in modules):
            reason = "multi-token prediction layers read it too"
        if reason is None and not quantized:
            reason = "all its consumers stay in float"
        rule = None if reason else self.policy.smooth_rule_for(kind, quantized)
        self.values.append(SeenValue(kind, tuple(modules), tuple(quantized), reason or rule))
        if reason is not None:
            return reason
        if rule is not None:
            self.used.add(rule)
        if rule is None or rule.method is SmoothMethod.NONE:
            return "no rule smooths it" if rule is None else f"policy: {rule}"
        pair = Pair(kind, node, str(operand_node(maker, weight).target), tuple(name for _, name in consumers), rule)
        if kind is PairKind.NORM and rule.method is SmoothMethod.M4:
            self._shift(program, pair, [user for user, _ in consumers])
        program.pairs.append(pair)
        return None

    def _shift(self, program: Program, pair: Pair, consumers: list[fx.Node]) -> None:
        for consumer in consumers:
            if consumer.target != ops.linear:
                fact = f"rule “{pair.rule}” shifts the input of {consumer.name}, which has no bias to compensate it."
                raise FxquantError(f"policy {self.policy.name}", fact, "Use smoothquant or flex for it.")
        _give_norm_bias(program, pair.value)
        for consumer in consumers:
            _give_linear_bias(program, consumer)


def _maker(node: fx.Node) -> tuple[fx.Node, str]:
    """The call that sets the scale of a value, and its argument for the weight that does."""
    if node.target == ops.moe_experts:
        return node, "up_proj"
    made_by = {ops.mla_attention: "kv", ops.swiglu: "up"}
    return (operand_node(node, made_by[node.target]) if node.target in made_by else node), "weight"


def _consumers(node: fx.Node) -> list[tuple[fx.Node, str]]:
    """The calls that multiply a value by weights, and the targets of these."""
    if node.target == ops.moe_experts:
        return [(node, str(operand_node(node, "down_proj").target))]
    return [(user, str(operand_node(user, name).target)) for user in node.users for name in READS.get(user.target, ())]


def _why_no_pair(node: fx.Node, maker: fx.Node, weights: Counter[str]) -> str | None:
    """Why the value of `node` cannot be scaled; None if it can."""
    if node.target == ops.moe_experts:
        return experts_not_scalable(node, weights)
    if node.target == ops.swiglu and operand(node, "gate") is maker:
        return "its gate and its values are the same"
    reason = not_scalable(node, maker, weights)
    if reason is None and maker is not node and operand(maker, "bias") is not None:
        return "the linear before it has a bias"
    return reason


def _modules(program: Program, weights: list[str]) -> list[tuple[str, Kind]]:
    """Path and kind of the modules whose weights are read from the checkpoint."""
    read = (program.parameters[name] for name in weights if name in program.parameters)
    return [(parameter.module, parameter.kind) for parameter in read]


def _give_norm_bias(program: Program, norm: fx.Node) -> None:
    if operand(norm, "bias") is None:
        weight = program.graph.tensor(str(operand_node(norm, "weight").target))
        _give_bias(program, norm, torch.empty_like(weight, dtype=torch.float32))


def _give_linear_bias(program: Program, linear: fx.Node) -> None:
    if operand(linear, "bias") is not None:
        return
    weight = operand_node(linear, "weight")
    tensor, module = program.graph.tensor(str(weight.target)), program.parameter(weight).module
    _give_bias(program, linear, tensor.new_empty(tensor.shape[:1]))
    if module in program.recipes:
        program.recipes[module] = replace(program.recipes[module], bias=True)


def restore_biases(program: Program, names: Collection[str]) -> None:
    """Give the norms and linears of a float graph the biases in `names`, which smoothing added."""
    for node in list(program.graph.graph.nodes):
        if node.target not in (ops.rms_norm, ops.linear) or not is_parameter(operand(node, "weight")):
            continue
        if tensor_name(program.parameter(operand_node(node, "weight")).module, "bias") in names:
            (_give_norm_bias if node.target == ops.rms_norm else _give_linear_bias)(program, node)


def _give_bias(program: Program, node: fx.Node, tensor: Tensor) -> None:
    """Give a norm or linear a new bias, `tensor` on meta, as a parameter of its module."""
    weight = program.parameter(operand_node(node, "weight"))
    name = tensor_name(weight.module, "bias")
    program.added[name] = tensor
    bias = Surgery(program, node).attach(name, tensor, replace(weight, names=(name,), role="bias"))
    set_operand(node, "bias", bias)
