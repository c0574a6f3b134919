"""W8A8_MIX in prefill: one scale per token instead of the calibrated one

    quantize_static → int_matmul → dequantize_static   →   quantize_per_token → int_matmul → dequantize_per_token

and the same after a norm that quantizes. Engines that split prefill from decode run such linears per token in prefill
and static in decode (vllm-ascend, w8a8_pdmix). The weight stays; `weight_scale` takes the place of the four
static parameters.
"""

from torch import fx

from fxquant import ops
from fxquant.ops.quantized import PER_TOKEN
from fxquant.passes.base import RewritePass
from fxquant.passes.write_form import FormWriter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, item_of, operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import Activation, Recipe


class PrefillPerToken(RewritePass):
    """Rewrites every static dequantization whose linear has the parameters of both forms."""

    name = "prefill-per-token"

    def __init__(self) -> None:
        self._forms = FormWriter()
        self._behind: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.dequantize_static:
            return ""
        recipe = _recipe(node, program)
        if recipe.scheme.activation is not Activation.BOTH:
            return f"its scheme is {recipe.scheme}"
        x8 = operand_node(operand_node(node, "acc"), "x")
        quantized = x8.target == ops.quantize_static or _norm(x8) is not None
        return None if quantized else f"its integers come from {x8.name}"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        product, recipe = operand_node(node, "acc"), _recipe(node, program)
        x8, x_scale = self._quantized(operand_node(product, "x"), program)
        surgery = Surgery(program, node, self._rules)
        accumulated = surgery.call(ops.int_matmul, (x8, operand(product, "weight")), f"{node.name}_per_token_int32")
        scale = surgery.parameter(recipe, "weight_scale")
        bias = (surgery.parameter(recipe, "bias"),) if recipe.bias else ()
        result = (accumulated, x_scale, scale, *bias)
        surgery.replace(surgery.call(ops.dequantize_per_token, result, f"{node.name}_per_token"))

    def _quantized(self, x8: fx.Node, program: Program) -> tuple[fx.Node, fx.Node]:
        """The input of a linear and its row scales, made once for all linears that read it."""
        norm = _norm(x8)
        if norm is None:
            surgery, values = Surgery(program, x8, self._rules), {"x": operand_node(x8, "x")}
            shared = self._forms.shared(surgery, PER_TOKEN, values)
            return shared["x"], shared["x_scale"]
        if norm not in self._behind:
            self._behind[norm] = _quantize_behind(Surgery(program, norm, self._rules))
        return self._behind[norm]


def _norm(x8: fx.Node) -> fx.Node | None:
    """The fused norm that quantized these integers per tensor; None if none did."""
    fused, index = item_of(x8)
    return fused if (fused.target, index) == (ops.add_rms_norm_quantize_static, 0) else None


def _quantize_behind(surgery: Surgery) -> tuple[fx.Node, fx.Node]:
    """A copy of the norm with per-token quantization; its sum replaces that of the first.

    The first one stays for W8A8 linears that read it, and is dropped if nothing does.
    """
    norm = surgery.site
    given, name = arguments(norm), norm.name.removesuffix("_fused")
    operands = [given[key] for key in ("x1", "x2", "weight", "eps", "bias") if given[key] is not None]
    call = surgery.call(ops.add_rms_norm_quantize_per_token, operands, f"{name}_fused")
    x8, scale, total = surgery.outputs(call, [f"{name}_{part}" for part in ("int8", "scale", "sum")])
    for user in list(norm.users):
        if item_of(user)[1] == 1:
            user.replace_all_uses_with(total)
    return x8, scale


def _recipe(node: fx.Node, program: Program) -> Recipe:
    weight = operand_node(operand_node(node, "acc"), "weight")
    return program.recipes[program.parameters[str(weight.target)].module]
