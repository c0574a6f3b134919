"""quantize_static → int_matmul → dequantize_static  →  static_linear
   int_matmul → dequantize_per_token                 →  per_token_linear, and so for int4 and for routed experts

A quantization per token stays apart, since several linears read it.
"""

from typing import Any

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

JOINED: dict[tuple[Any, Any], Any] = {
    (ops.int_matmul, ops.dequantize_static): ops.static_linear,
    (ops.int_matmul, ops.dequantize_per_token): ops.per_token_linear,
    (ops.int4_matmul, ops.dequantize_per_token): ops.per_token_int4_linear,
    (ops.grouped_int_matmul, ops.grouped_dequantize): ops.grouped_linear,
    (ops.grouped_int4_matmul, ops.grouped_dequantize): ops.grouped_int4_linear,
}
"""Product and dequantization → the operator that says both."""
DEQUANTIZE = {dequantize for _, dequantize in JOINED}


class JoinLinears(RewritePass):
    """Rewrites every dequantization of sums that nothing else reads."""

    name = "join-linears"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target not in DEQUANTIZE:
            return ""
        product = operand_node(node, "acc")
        if (product.target, node.target) not in JOINED:
            return f"its sums come from {product.name}, which is no product of integers"
        if len(product.users) > 1:
            return f"{product.name} is also read elsewhere"
        codes = operand_node(product, "x")
        if node.target == ops.dequantize_static and (codes.target != ops.quantize_static or len(codes.users) > 1):
            return f"{codes.name} is not quantized for this linear alone"
        return None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        product = operand_node(node, "acc")
        joined = JOINED[product.target, node.target]
        sources = [node, product]
        given: dict[str, Any] = {}
        if joined == ops.static_linear:
            codes = operand_node(product, "x")
            sources = [node, codes, product]
            given["biased"] = program.recipes[program.parameter(operand_node(product, "weight")).module].bias
        arguments = [_taken(argument.name, given, sources) for argument in joined._schema.arguments]
        surgery = Surgery(program, node, self._rules)
        surgery.replace(surgery.call(joined, arguments, f"{node.name}_joined"))


def _taken(name: str, given: dict[str, Any], sources: list[fx.Node]) -> Any:
    """The argument `name` of the joined operator: the first of the steps that has one by that name says it."""
    if name in given:
        return given[name]
    for source in sources:
        if any(argument.name == name for argument in source.target._schema.arguments):  # type: ignore[union-attr]
            return operand(source, name)
    return None
