"""quantize(x), quantize(x)  →  one quantize(x), read by both

Static linears own the parameters of their quantization, so q_a and kv_a, or gate and up, each have one of the same
input. If their ranges are equal, so are the integers, and all read the first one. Parameters of the others are still
stored, as their recipes say.
"""

from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.program.operands import item_of, operand_node
from fxquant.program.program import Program
from fxquant.schemes.schemes import ActivationRange


class ShareQuantize(RewritePass):
    """Merges quantizations of one input: static ones with equal ranges, and all per token."""

    name = "share-quantize"

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target not in (ops.quantize_static, ops.quantize_per_token):
            return ""
        others = _earlier(node)
        if not others or _twin(node, program) is not None:
            return None if others else ""
        ranges = " and ".join(_in_words(_range(quantize, program)) for quantize in (others[0], node))
        return f"{others[0].name} reads the same input, but their ranges differ: {ranges}"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        twin = _twin(node, program)
        assert twin is not None, node.name
        # reversed: `_take_over` puts each right after the twin, and so the first result first
        for item in sorted((user for user in node.users if item_of(user)[1] is not None), reverse=True):
            _take_over(item, twin, program)
        node.replace_all_uses_with(twin)
        _erase(node, program)


def _earlier(node: fx.Node) -> list[fx.Node]:
    """The same operator on the same input, before `node` in the graph."""
    return sorted(user for user in operand_node(node, "x").users if user.target == node.target and user < node)


def _twin(node: fx.Node, program: Program) -> fx.Node | None:
    """The first of `_earlier` that gives the same integers; None if none does."""
    return next((earlier for earlier in _earlier(node) if _range(earlier, program) == _range(node, program)), None)


def _range(node: fx.Node, program: Program) -> ActivationRange | str:
    """What decides its integers besides its input: "" per token, the parameter's own name if no range is known."""
    if node.target == ops.quantize_per_token:
        return ""
    scale = str(operand_node(node, "input_scale").target)
    recipe = program.recipes.get(program.parameters[scale].module)
    return scale if recipe is None or recipe.activation is None else recipe.activation


def _in_words(observed: ActivationRange | str) -> str:
    return observed if isinstance(observed, str) else f"{observed.low:.6g} … {observed.high:.6g}"


def _take_over(item: fx.Node, twin: fx.Node, program: Program) -> None:
    """Let the consumers of `item`, a result of the erased node, read the same result of `twin`."""
    call, index = item_of(item)
    same = [user for user in twin.users if item_of(user) == (twin, index)]
    if not same:
        item.replace_input_with(call, twin)
        return
    twin.append(same[0])
    item.replace_all_uses_with(same[0])
    _erase(item, program)


def _erase(node: fx.Node, program: Program) -> None:
    program.graph.graph.erase_node(node)
    program.names.discard(node.name)
