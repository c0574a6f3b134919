"""moe_experts(x, ids, weights)  →  one routed pass through integer grouped matmuls

init_routing → quantize_per_token → grouped matmul (gate, up) → dequantize → swiglu
             → quantize_per_token → grouped matmul (down) → dequantize → finalize_routing
"""

from torch import fx

from fxquant import ops
from fxquant.errors import InternalError
from fxquant.passes.base import RewritePass
from fxquant.passes.write_form import FormWriter, expert_form
from fxquant.program.linears import PROJECTIONS
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules


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
        forms = FormWriter()

        def project(x: fx.Node, projection: str) -> fx.Node:
            recipe, name = recipes[projection], f"{node.name}_{projection}"
            form = expert_form(recipe)
            if form is None:
                raise InternalError(recipe.module, f"routed experts have no form of {recipe.scheme}")
            return forms.write(surgery, recipe, form, {"x": x, "counts": counts}, name, last=name)

        gate, up = project(rows, "gate_proj"), project(rows, "up_proj")
        hidden = surgery.call(ops.swiglu, (gate, up), f"{node.name}_swiglu")
        down = project(hidden, "down_proj")
        arranged = (down, row_index, given["weights"])
        surgery.replace(surgery.call(ops.moe_finalize_routing, arranged, f"{node.name}_finalize"))


def _module(node: fx.Node, projection: str, program: Program) -> str:
    return program.parameter(operand_node(node, projection)).module
