"""linear(x)  →  the form of its scheme: `fxquant.ops.quantized.LINEAR_FORMS`

W8A8          quantize_static → int_matmul → dequantize_static
W8A8_MIX      the same; engines that split prefill from decode run W8A8_DYNAMIC in prefill
W8A8_DYNAMIC  quantize_per_token → int_matmul → dequantize_per_token
W4A8_DYNAMIC  quantize_per_token → int4_matmul → dequantize_per_token

Linears that read the same tensor share one per-token quantization. A static one keeps its own, since it owns the
parameters.
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.passes.write_form import FormWriter, form_of
from fxquant.program.linears import is_parameter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules


class QuantizeLinear(RewritePass):
    """Rewrites every `fxq::linear` that has a recipe."""

    name = "quantize-linear"

    def __init__(self) -> None:
        self._forms = FormWriter()
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.linear:
            return ""
        if not is_parameter(operand(node, "weight")):
            return "its weight is computed"
        module = _module(node, program)
        return None if module in program.recipes else f"policy: {program.rules[module]}"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        recipe = program.recipes[_module(node, program)]
        surgery = Surgery(program, node, self._rules)
        surgery.replace(self._forms.write(surgery, recipe, form_of(recipe), {"x": operand_node(node, "x")}, node.name))


def _module(node: fx.Node, program: Program) -> str:
    return program.parameter(operand_node(node, "weight")).module
