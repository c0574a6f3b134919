"""past_i [B, T, width]  →  past_i_key [B, H, T, nope + rope], past_i_value [B, H, T, v]: a cache of all heads

cat(past, new) → kv_b_proj → mla_attention   →   kv_b_proj(new) → expand_heads → cat(past_key, …) → attend_heads
"""

from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.ops.by_token import BY_TOKEN
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.onnx.caches import ATEN, PARTS, Appended, add_inputs, appended_caches, return_instead
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, operand_node
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

CACHE = "expanded"


class ExpandCaches(Pass):
    """Rewrites the cache of every layer, so that kv_b_proj runs over new tokens alone.

    Raises FxquantError for a layer whose keys and values do not come of each latent by itself.
    """

    name = "expand-caches"

    def apply(self, program: Program) -> PassResult:
        caches, rules = appended_caches(program, CACHE), ShapeRules()
        return_instead(program, {cache.present: _expanded(program, cache, rules) for cache in caches})
        return PassResult(self.name, tuple(cache.present.name for cache in caches))


def _expanded(program: Program, cache: Appended, rules: ShapeRules) -> list[fx.Node]:
    attention, between = _attention(cache)
    cache.present.replace_all_uses_with(cache.new, lambda user: user.op != "output")
    for node in between:
        node.meta["val"] = rules.call(node.target, fx.map_arg(node.args, lambda argument: argument.meta["val"]))
    given, surgery = arguments(attention), Surgery(program, attention, rules)
    name, heads = attention.name, (given["kv"], given["k_rope"], given["num_heads"], given["v_head_dim"])
    new = surgery.outputs(
        surgery.call(ops.expand_heads, heads, f"{name}_new"), [f"{name}_new_{part}" for part in PARTS]
    )
    past = cache.past.meta["val"].shape[1]
    shapes = tuple((*node.meta["val"].shape[:2], past, node.meta["val"].shape[3]) for node in new)
    inputs = add_inputs(program, cache, shapes)
    grown = [
        surgery.call(ATEN.cat.default, ([before, row], 2), f"{name}_{part}")
        for part, before, row in zip(PARTS, inputs, new, strict=True)
    ]
    operands = (given["q"], *grown, given["attention_mask"], given["softmax_scale"])
    surgery.replace(surgery.call(ops.attend_heads, operands, f"{name}_heads"))
    return grown


def _attention(cache: Appended) -> tuple[fx.Node, list[fx.Node]]:
    """The attention over a cache, and the calls between them in graph order."""
    reached, between, readers = {cache.present}, list[fx.Node](), list[fx.Node]()
    for node in cache.present.graph.nodes:
        if node.op == "output" or not reached.intersection(node.all_input_nodes):
            continue
        reads = reached.intersection(node.all_input_nodes)
        if node.target == ops.mla_attention and reads == {operand_node(node, "kv"), operand_node(node, "k_rope")}:
            readers.append(node)
        elif node.target in BY_TOKEN or _splits_features(node):
            reached.add(node)
            between.append(node)
        else:
            raise _refused(cache, f"{node.name} reads latents of all tokens together")
    if len(readers) != 1:
        raise _refused(cache, f"{len(readers)} attentions read its latents")
    return readers[0], between


def _splits_features(node: fx.Node) -> bool:
    return node.target == ATEN.split_with_sizes.default and arguments(node).get("dim") == -1


def _refused(cache: Appended, fact: str) -> FxquantError:
    return FxquantError(f"--onnx-cache {CACHE}", f"layer {cache.index}: {fact}.", "Pass --onnx-cache latent.")
