"""W8A8_MIX in prefill: one scale a token instead of the calibrated one

    quantize_static → int_matmul → dequantize_static   →   quantize_per_token → int_matmul → dequantize_per_token

and the same behind a norm that quantizes. Engines that split prefill from decode run such linears per token in the
first and static in the second (vllm-ascend, w8a8_pdmix). The weight stays; `weight_scale` takes the place of the four
static parameters.
"""

import operator
from typing import Any

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.passes.quantize_linear import quantize_per_token
from fxquant.program.node_builder import Surgery
from fxquant.program.program import Program, input_node
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import Activation, Recipe


class PrefillPerToken(RewritePass):
    """Rewrites every static dequantization whose linear has the parameters of both forms."""

    name = "prefill-per-token"

    def __init__(self) -> None:
        self._per_token: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.dequantize_static:
            return ""
        recipe = _recipe(node, program)
        if recipe.scheme.activation is not Activation.BOTH:
            return f"its scheme is {recipe.scheme}"
        x8 = input_node(input_node(node, 0), 0)
        made = x8.target == ops.quantize_static or _norm(x8) is not None
        return None if made else f"its integers come from {x8.name}"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        product, recipe = input_node(node, 0), _recipe(node, program)
        x8, x_scale = self._quantized(input_node(product, 0), program)
        surgery = Surgery(program, node, self._rules)
        accumulated = surgery.call(ops.int_matmul, (x8, product.args[1]), f"{node.name}_per_token_int32")
        scale = surgery.parameter(recipe, "weight_scale")
        bias = (surgery.parameter(recipe, "bias"),) if recipe.bias else ()
        result = (accumulated, x_scale, scale, *bias)
        surgery.replace(surgery.call(ops.dequantize_per_token, result, f"{node.name}_per_token"))

    def _quantized(self, x8: fx.Node, program: Program) -> tuple[fx.Node, fx.Node]:
        """The input of a linear and its row scales, made once for all linears that read it."""
        norm = _norm(x8)
        if norm is None:
            return quantize_per_token(Surgery(program, x8, self._rules), input_node(x8, 0), self._per_token)
        if norm not in self._per_token:
            self._per_token[norm] = _quantize_behind(Surgery(program, norm, self._rules))
        return self._per_token[norm]


def _norm(x8: fx.Node) -> fx.Node | None:
    """The norm that made these integers of a tensor's scale."""
    source = x8.args[0] if x8.target is operator.getitem and x8.args[1] == 0 else None
    return source if isinstance(source, fx.Node) and source.target == ops.add_rms_norm_quantize_static else None


def _quantize_behind(surgery: Surgery) -> tuple[fx.Node, fx.Node]:
    """The norm again, with the other quantization; its sum takes the place of the first one's."""
    norm = surgery.site
    x1, x2, weight, eps, _, _, *bias = norm.args
    name = norm.name.removesuffix("_fused")
    arguments: tuple[Any, ...] = (x1, x2, weight, eps, *bias)
    made = surgery.call(ops.add_rms_norm_quantize_per_token, arguments, f"{name}_fused")
    x8, scale, total = surgery.outputs(made, [f"{name}_{part}" for part in ("int8", "scale", "sum")])
    for user in list(norm.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(total)
    return x8, scale


def _recipe(node: fx.Node, program: Program) -> Recipe:
    weight = input_node(input_node(node, 0), 1)
    return program.recipes[program.parameters[str(weight.target)].module]
