"""quantize_per_token(swiglu(gate, up))  →  swiglu_quantize_per_token(gate, up)"""

from dataclasses import dataclass, field

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.node_builder import Surgery
from fxquant.program.node_names import operator_name
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules


@dataclass
class FuseSwigluQuantize(RewritePass):
    """Rewrites every swiglu whose only consumer is a quantization per token.

    `widest`: the most features that the engine's operator takes; None for no limit.
    """

    widest: int | None = None
    rules: ShapeRules = field(default_factory=ShapeRules)
    name = "fuse-swiglu-quantize"

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.swiglu:
            return ""
        others = [user for user in node.users if user.target != ops.quantize_per_token]
        if others or len(node.users) != 1:
            consumers = ", ".join(dict.fromkeys(operator_name(user) for user in others or node.users))
            return f"read by {consumers or 'nothing'}"
        features = node.meta["val"].shape[-1]
        if self.widest is not None and features > self.widest:
            return f"{features} features, the engine's operator takes at most {self.widest}"
        return None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        (consumer,) = node.users
        surgery = Surgery(program, consumer, self.rules)
        surgery.replace(surgery.call(ops.swiglu_quantize_per_token, node.args, f"{node.name}_fused"))
        program.graph.graph.erase_node(node)
