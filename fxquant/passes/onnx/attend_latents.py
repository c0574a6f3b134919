"""mla_attention over kv_b_proj of all latents  →  attend_latents, which may form keys and values or not

linear(c_kv, kv_b_proj) → mla_attention(q, …, k_rope)   →   attend_latents(q, c_kv, k_rope, kv_b_proj)
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.linears import is_parameter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, operand, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules


class AttendLatents(RewritePass):
    """Rewrites every `fxq::mla_attention` whose keys and values are a float linear without a bias, and nothing else's.

    A quantized kv_b_proj multiplies integers, which can't be multiplied with the queries instead.
    """

    name = "attend-latents"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.mla_attention:
            return ""
        kv = operand_node(node, "kv")
        if kv.target != ops.linear or not is_parameter(operand(kv, "weight")):
            return f"its keys and values come from {kv.name}, which is not a float linear"
        if operand(kv, "bias") is not None:
            return f"{kv.name} has a bias"
        return f"{kv.name} is also read elsewhere" if len(kv.users) > 1 else None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        given, kv = arguments(node), operand_node(node, "kv")
        numbers = (given[name] for name in ("attention_mask", "num_heads", "v_head_dim", "softmax_scale"))
        surgery = Surgery(program, node, self._rules)
        latents = (given["q"], operand(kv, "x"), given["k_rope"], operand(kv, "weight"), *numbers)
        surgery.replace(surgery.call(ops.attend_latents, latents, f"{node.name}_latents"))
