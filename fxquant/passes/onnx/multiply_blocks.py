"""quantize_per_token → int4_matmul → dequantize_per_token  →  block_linear, which reads x itself"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import item_of, operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import block_size


class MultiplyBlocks(RewritePass):
    """Rewrites every int4 linear. What it computes changes: activations are not rounded by the token any more."""

    name = "multiply-blocks"

    def __init__(self, accuracy_level: int) -> None:
        self._rules, self._accuracy_level = ShapeRules(), accuracy_level

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.dequantize_per_token:
            return ""
        product = operand_node(node, "acc")
        if product.target != ops.int4_matmul:
            return ""
        if len(product.users) > 1:
            return f"{product.name} is also read elsewhere"
        codes, _ = item_of(operand_node(product, "x"))
        return None if codes.target == ops.quantize_per_token else f"its codes come from {codes.name}"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        product = operand_node(node, "acc")
        quantize, _ = item_of(operand_node(product, "x"))
        weight = operand_node(product, "weight")
        second, bias = operand(product, "weight_scale_second"), operand(node, "bias")
        size = block_size(program.recipes[program.parameter(weight).module])
        arguments = (operand(quantize, "x"), weight, operand(node, "weight_scale"), second, bias)
        surgery = Surgery(program, node, self._rules)
        call = (*arguments, size, self._accuracy_level)
        surgery.replace(surgery.call(ops.block_linear, call, f"{node.name}_blocks"))
