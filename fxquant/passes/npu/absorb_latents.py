"""mla_attention over kv_b_proj of all latents  →  latent_attention over the cache itself

    linear(c_kv, kv_b_proj) → mla_attention(q, …, k_rope)   →   latent_attention(q, kv_b_proj, written cache)

The halves W_UK and W_UV of kv_b_proj go to the side of the queries (DeepSeek-V2, arXiv:2405.04434, section 2.1.2), so
a decoding step reads each cached latent once and computes no keys. The pass follows `PageLatents`; a layer that it
skips gathers its latents and multiplies all of them by kv_b_proj.
"""

from dataclasses import dataclass

import torch
from torch import fx

from fxquant import ops
from fxquant.passes.base import RewritePass
from fxquant.passes.npu.page_latents import cache_inputs
from fxquant.program.linears import is_parameter
from fxquant.program.node_builder import Surgery
from fxquant.program.operands import arguments, item_of, operand, operand_node, set_operand
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

CONCATENATE = torch.ops.aten.cat.default
SPLIT = torch.ops.aten.split_with_sizes.default


@dataclass(frozen=True)
class _Keys:
    """Where the keys of an attention come from: `linear` of the first part of cached and `new` latents."""

    linear: fx.Node
    new: fx.Node
    written: fx.Node


class AbsorbLatents(RewritePass):
    """Rewrites every `fxq::mla_attention` whose keys and values are a float linear of what the cache holds."""

    name = "absorb-latents"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.mla_attention:
            return ""
        keys = _keys(node, program)
        return keys if isinstance(keys, str) else None

    def rewrite(self, node: fx.Node, program: Program) -> None:
        keys = _keys(node, program)
        assert isinstance(keys, _Keys)
        # write_latents stores the last positions only: without the cached ones, the gathered copy is dead code
        set_operand(keys.written, "latents", keys.new)
        block_table, _, seq_lens = cache_inputs(program)
        given, weight = arguments(node), operand(keys.linear, "weight")
        numbers = (given[name] for name in ("num_heads", "v_head_dim", "softmax_scale"))
        surgery = Surgery(program, node, self._rules)
        absorbed = (given["q"], weight, keys.written, block_table, seq_lens, *numbers)
        surgery.replace(surgery.call(ops.latent_attention, absorbed, f"{node.name}_absorbed"))


def _keys(node: fx.Node, program: Program) -> _Keys | str:
    """The keys of an attention, or why the cache does not hold what they are made of."""
    q, kv, k_rope, mask = (operand_node(node, name) for name in ("q", "kv", "k_rope", "attention_mask"))
    if kv.target != ops.linear or not is_parameter(operand(kv, "weight")):
        return f"its keys and values come from {kv.name}, which is not a float linear"
    if operand(kv, "bias") is not None:
        return f"{kv.name} has a bias"
    latents = _half(operand_node(kv, "x"), 0)
    if latents is None or latents is not _half(k_rope, 1):
        return "its keys are not the two parts of one latent"
    written = next((user for user in latents.users if user.target == ops.write_latents), None)
    if written is None or written not in program.graph.results:
        return "its latents are not those that the cache holds"
    new = _appended(latents, operand_node(written, "cache"))
    if new is None:
        return "its latents are not the cache followed by new ones"
    # latent_attention masks by seq_lens, and has no operand for another mask
    if mask is not program.graph.graph.find_nodes(op="placeholder")[1]:
        return f"its mask {mask.name} is computed"
    tokens = program.graph.graph.find_nodes(op="placeholder")[0].meta["val"].shape[1]
    if {str(value.meta["val"].shape[1]) for value in (q, new)} != {str(tokens)}:
        return "it does not have one query and one latent per token"
    return _Keys(kv, new, written)


def _appended(latents: fx.Node, cache: fx.Node) -> fx.Node | None:
    """The latents after all positions of `cache`; None if `latents` is not such a concatenation."""
    if latents.target != CONCATENATE or operand(latents, "dim") != 1 or len(operand(latents, "tensors")) != 2:
        return None
    gathered, new = operand(latents, "tensors")
    return new if gathered.target == ops.gather_latents and operand(gathered, "cache") is cache else None


def _half(node: fx.Node, index: int) -> fx.Node | None:
    """The value that a split into two along the features has `node` as part `index` of; None if there is none."""
    split, part = item_of(node)
    if part != index or split.target != SPLIT:
        return None
    value, halves = operand_node(split, "self"), len(operand(split, "split_sizes")) == 2
    return value if halves and operand(split, "dim") in (-1, value.meta["val"].dim() - 1) else None
