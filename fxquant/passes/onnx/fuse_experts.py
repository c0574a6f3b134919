"""moe_init_routing → … → moe_finalize_routing over int4 weights  →  block_experts, which reads x itself"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.experts import QuantizedExperts, quantized_experts
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import block_size


class FuseExperts(RewritePass):
    """Rewrites the int4 experts of every layer. What they compute changes: activations are not rounded by the token."""

    name = "fuse-experts"

    def __init__(self, accuracy_level: int) -> None:
        self._rules, self._accuracy_level = ShapeRules(), accuracy_level

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.moe_finalize_routing:
            return ""
        experts = quantized_experts(node)
        if experts is None:
            return "its rows are not those of gated MLPs"
        products = [operand_node(result, "acc") for result in (experts.gate, experts.up, experts.down)]
        other = [product.name for product in products if product.target != ops.grouped_int4_matmul]
        return f"{', '.join(other)}: no int4 weights" if other else None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        experts = quantized_experts(node)
        assert experts is not None, node.name
        sizes = [block_size(program.recipes[program.parameter(weight).module]) for weight in experts.weights()]
        size = min(found for found in sizes if found)
        routed = (operand(experts.routing, "x"), operand(experts.routing, "ids"), operand(node, "weights"))
        arguments = (*routed, *_tensors(experts), size, self._accuracy_level)
        surgery = Surgery(program, node, self._rules)
        surgery.replace(surgery.call(ops.block_experts, arguments, f"{node.name}_blocks"))


def _tensors(experts: QuantizedExperts) -> list[fx.Node | None]:
    """Weight, scale and second scale or None of each projection."""
    tensors = []
    for result in (experts.gate, experts.up, experts.down):
        product = operand_node(result, "acc")
        second = operand(product, "weight_scale_second")
        tensors += [operand(product, "weight"), operand(result, "weight_scale"), second]
    return tensors
