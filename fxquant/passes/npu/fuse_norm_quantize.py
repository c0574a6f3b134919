"""quantize(rms_norm(x1 + x2))  →  one operator that gives the integers and the sum

add_rms_norm_quantize_static     the norm's one consumer is a static quantization
add_rms_norm_quantize_per_token  its one consumer is a quantization per token
add_rms_norm                     anything else reads it

The sum serves its other consumers. A residual that the next layer's norm reads is then added in that layer.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.linears import is_parameter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, item_of, operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

WITHOUT_SUM = "its input is not a sum of two tensors of one shape, and engines fuse no other norms"


@dataclass
class FuseNormQuantize(RewritePass):
    """Rewrites every norm that is the first to read a sum.

    `float32`: values that stay float32 whatever the model's dtype; a fused operator has one dtype for all.
    """

    float32: frozenset[fx.Node] = frozenset()
    rules: ShapeRules = field(default_factory=ShapeRules)
    name = "fuse-norm-quantize"

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.rms_norm:
            return ""
        total = operand_node(node, "x")
        if not _adds_alike(total):
            return WITHOUT_SUM
        if total in self.float32:
            return "its sum stays in float32"
        first = min(total.users)
        return None if first is node else f"{first.name} reads its sum before it"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        total, consumer = operand_node(node, "x"), _one_quantization(node)
        surgery, graph = Surgery(program, node, self.rules), program.graph.graph
        fused, outputs = self._fused(surgery, total, consumer)
        names = [old[0].name if old else f"{node.name}_unread" for old in outputs]
        values = surgery.outputs(fused, [*(f"{name}_new" for name in names), f"{node.name}_sum"])
        total.replace_all_uses_with(values[-1])
        for value, old, name in zip(values, outputs, names, strict=False):
            for replaced in old:
                replaced.replace_all_uses_with(value)
                graph.erase_node(replaced)
            program.names.discard(value.name)
            value.name = name
        gone = {replaced for old in outputs for replaced in old}
        for last in (consumer, node, total):
            if last is not None and last not in gone:
                graph.erase_node(last)

    def _fused(self, surgery: Surgery, total: fx.Node, consumer: fx.Node | None) -> tuple[fx.Node, list[list[fx.Node]]]:
        """The new call, and for each result except the sum, the nodes that computed it before."""
        node = surgery.site
        norm, name = arguments(node), f"{node.name}_fused"
        given = (operand(total, "self"), operand(total, "other"), norm["weight"], norm["eps"])
        bias = () if norm["bias"] is None else (norm["bias"],)
        if consumer is None:
            return surgery.call(ops.add_rms_norm, (*given, *bias), name), [[node]]
        if consumer.target == ops.quantize_per_token:
            items = [[user for user in consumer.users if item_of(user)[1] == index] for index in (0, 1)]
            return surgery.call(ops.add_rms_norm_quantize_per_token, (*given, *bias), name), items
        scales = [operand_node(consumer, name_of) for name_of in ("input_scale", "input_offset")]
        for parameter in scales:  # read by the quantization, so they stand after the norm
            node.prepend(parameter)
        return surgery.call(ops.add_rms_norm_quantize_static, (*given, *scales, *bias), name), [[consumer]]


def _adds_alike(node: fx.Node) -> bool:
    """Whether `node` adds two float tensors of one shape and dtype."""
    if node.target != torch.ops.aten.add.Tensor or operand(node, "alpha") != 1:
        return False
    summands = (operand(node, "self"), operand(node, "other"))
    values = [summand.meta.get("val") if isinstance(summand, fx.Node) else None for summand in summands]
    if not all(isinstance(value, Tensor) and value.is_floating_point() for value in values):
        return False
    return len({(str(value.shape), value.dtype) for value in values if isinstance(value, Tensor)}) == 1


def _one_quantization(norm: fx.Node) -> fx.Node | None:
    """The only consumer of `norm`, if it is a quantization that engines fuse with it."""
    if len(norm.users) != 1:
        return None
    consumer = next(iter(norm.users))
    if consumer.target == ops.quantize_per_token:
        return consumer if all(item_of(user)[1] is not None for user in consumer.users) else None
    if consumer.target != ops.quantize_static:
        return None
    read = (operand(norm, "weight"), operand(consumer, "input_scale"), operand(consumer, "input_offset"))
    return consumer if all(map(is_parameter, read)) else None
