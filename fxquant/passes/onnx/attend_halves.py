"""attend_latents over halves that were joined  →  attend_halves, which reads them where they are

cat(key, value) → squeeze → split → attend_latents(q, c_kv, k_rope, …)   →   attend_halves(q, key, value, …)
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.passes.onnx.caches import ATEN
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, item_of, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules


class AttendHalves(RewritePass):
    """Rewrites every `fxq::attend_latents` whose latents are joined halves."""

    name = "attend-halves"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.attend_latents:
            return ""
        return None if _halves(node) is not None else "its latents are not read as one split of joined halves"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        given = arguments(node)
        names = ("kv_b_weight", "attention_mask", "num_heads", "v_head_dim", "softmax_scale")
        surgery = Surgery(program, node, self._rules)
        operands = (given["q"], *(_halves(node) or ()), *(given[name] for name in names))
        surgery.replace(surgery.call(ops.attend_halves, operands, f"{node.name}_halves"))


def _halves(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Key and value that c_kv and k_rope are the parts of, in this order."""
    (split, first), (other, second) = (item_of(operand_node(node, name)) for name in ("c_kv", "k_rope"))
    if split is not other or (first, second) != (0, 1) or split.target != ATEN.split_with_sizes.default:
        return None
    squeezed = operand_node(split, "self")
    joined = arguments(squeezed)["self"] if squeezed.target == ATEN.squeeze.dim else None
    if (
        not isinstance(joined, fx.Node)
        or joined.target != ATEN.cat.default
        or len(arguments(split)["split_sizes"]) != 2
    ):
        return None
    parts = arguments(joined)["tensors"]
    return tuple(parts) if len(parts) == 2 and arguments(joined)["dim"] == -1 else None
