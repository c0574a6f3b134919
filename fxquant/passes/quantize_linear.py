"""linear(x)  →  dequantize(int_matmul(quantize(x), weight))

W8A8          quantize_static → int_matmul → dequantize_static
W8A8_MIX      the same; engines that split prefill from decode run W8A8_DYNAMIC there
W8A8_DYNAMIC  quantize_per_token → int_matmul → dequantize_per_token
W4A8_DYNAMIC  quantize_per_token → int4_matmul → dequantize_per_token

Linears that read the same tensor share one per-token quantization. A static one keeps its own, since it owns the
parameters.
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.linears import is_parameter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import Recipe


class QuantizeLinear(RewritePass):
    """Rewrites every `fxq::linear` that has a recipe."""

    name = "quantize-linear"

    def __init__(self) -> None:
        self._per_token: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
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
        static = recipe.scheme.static
        surgery.replace(_static(surgery, recipe) if static else self._dynamic(surgery, recipe))

    def _dynamic(self, surgery: Surgery, recipe: Recipe) -> fx.Node:
        node = surgery.site
        x8, x_scale = quantize_per_token(surgery, operand_node(node, "x"), self._per_token)
        accumulated = _matmul(surgery, recipe, x8)
        scale = surgery.parameter(recipe, "weight_scale")
        bias = (surgery.parameter(recipe, "bias"),) if recipe.bias else ()
        return surgery.call(ops.dequantize_per_token, (accumulated, x_scale, scale, *bias), f"{node.name}_dequantize")


def quantize_per_token(surgery: Surgery, x: fx.Node, shared: dict) -> tuple[fx.Node, fx.Node]:
    """int8 `x` and its row scales, made once for each `x`."""
    if x not in shared:
        pair = surgery.call(ops.quantize_per_token, (x,), f"{x.name}_quantize")
        shared[x] = tuple(surgery.outputs(pair, (f"{x.name}_int8", f"{x.name}_scale")))
    return shared[x]


def _static(surgery: Surgery, recipe: Recipe) -> fx.Node:
    name, x = surgery.site.name, operand_node(surgery.site, "x")
    scale, offset = surgery.parameter(recipe, "input_scale"), surgery.parameter(recipe, "input_offset")
    x8 = surgery.call(ops.quantize_static, (x, scale, offset), f"{name}_input_int8")
    accumulated = _matmul(surgery, recipe, x8)
    deq_scale, quant_bias = surgery.parameter(recipe, "deq_scale"), surgery.parameter(recipe, "quant_bias")
    return surgery.call(ops.dequantize_static, (accumulated, deq_scale, quant_bias), f"{name}_dequantize")


def _matmul(surgery: Surgery, recipe: Recipe, x8: fx.Node) -> fx.Node:
    name = f"{surgery.site.name}_int32"
    weight = surgery.parameter(recipe, "weight")
    if not recipe.int4:
        return surgery.call(ops.int_matmul, (x8, weight), name)
    second = (surgery.parameter(recipe, "weight_scale_second"),) if recipe.group_size else ()
    return surgery.call(ops.int4_matmul, (x8, weight, *second), name)


def _module(node: fx.Node, program: Program) -> str:
    return program.parameter(operand_node(node, "weight")).module
