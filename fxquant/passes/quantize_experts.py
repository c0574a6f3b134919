"""moe_experts(x, ids, weights)  →  one routed pass through integer grouped matmuls

init_routing → quantize_per_token → grouped matmul (gate, up) → dequantize → swiglu
             → quantize_per_token → grouped matmul (down) → dequantize → finalize_routing
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.passes.quantize_linear import quantize_per_token
from fxquant.program.linears import PROJECTIONS
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import Recipe


class QuantizeExperts(RewritePass):
    """Rewrites every `fxq::moe_experts` whose three projections have recipes."""

    name = "quantize-experts"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.moe_experts:
            return ""
        missing = [name for name in PROJECTIONS if _module(node, name, program) not in program.recipes]
        return f"policy keeps {', '.join(missing)} in float" if missing else None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        surgery = Surgery(program, node, self._rules)
        given = arguments(node)
        recipes = {name: program.recipes[_module(node, name, program)] for name in PROJECTIONS}
        count = len(recipes["gate_proj"].modules)
        routed = surgery.call(ops.moe_init_routing, (given["x"], given["ids"], count), f"{node.name}_init_routing")
        names = (f"{node.name}_rows", f"{node.name}_row_index", f"{node.name}_counts")
        rows, row_index, counts = surgery.outputs(routed, names)
        pair = quantize_per_token(surgery, rows, {})
        gate, up = (_project(surgery, recipes[name], pair, counts, name) for name in ("gate_proj", "up_proj"))
        hidden = surgery.call(ops.swiglu, (gate, up), f"{node.name}_swiglu")
        pair = quantize_per_token(surgery, hidden, {})
        down = _project(surgery, recipes["down_proj"], pair, counts, "down_proj")
        arranged = (down, row_index, given["weights"])
        surgery.replace(surgery.call(ops.moe_finalize_routing, arranged, f"{node.name}_finalize"))


def _project(
    surgery: Surgery, recipe: Recipe, pair: tuple[fx.Node, fx.Node], counts: fx.Node, projection: str
) -> fx.Node:
    name, (x8, x_scale) = f"{surgery.site.name}_{projection}", pair
    weight = surgery.parameter(recipe, "weight")
    if recipe.int4:
        second = (surgery.parameter(recipe, "weight_scale_second"),) if recipe.group_size else ()
        accumulated = surgery.call(ops.grouped_int4_matmul, (x8, weight, counts, *second), f"{name}_int32")
    else:
        accumulated = surgery.call(ops.grouped_int_matmul, (x8, weight, counts), f"{name}_int32")
    scale = surgery.parameter(recipe, "weight_scale")
    return surgery.call(ops.grouped_dequantize, (accumulated, x_scale, scale, counts), name)


def _module(node: fx.Node, projection: str, program: Program) -> str:
    return program.parameter(operand_node(node, projection)).module
