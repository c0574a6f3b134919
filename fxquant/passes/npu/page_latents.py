"""past_i, present_i  →  a cache in pages

past_i     →  gather_latents(past_i, block_table)
present_i  →  write_latents(past_i, present_i, slot_mapping)

The graph then takes a cache [num_blocks, block_size, width] where it took `past_i`, and three more inputs:
block_table int32 [B, blocks], slot_mapping int32 [B, S], seq_lens int32 [B] (`fxquant.ops.latent_cache`). Its
attention_mask [B, blocks · block_size + S] says which of the gathered positions hold a latent.
"""

import torch
from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.passes.base import PassResult, RewritePass
from fxquant.program.node_builder import Surgery
from fxquant.program.program import Program
from fxquant.program.shape_inference import ShapeRules

CACHE_INPUTS = ("block_table", "slot_mapping", "seq_lens")
"""The last inputs of a graph whose cache is in pages."""


class PageLatents(RewritePass):
    """Rewrites every `past_i` and its `present_i`."""

    name = "page-latents"

    def __init__(self) -> None:
        self._rules = ShapeRules()

    def apply(self, program: Program) -> PassResult:
        _add_inputs(program)
        return super().apply(program)

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        return None if node in caches(program) else ""

    def rewrite(self, node: fx.Node, program: Program) -> None:
        position = caches(program).index(node) + 1
        present = program.graph.results[position]
        block_table, slot_mapping, _ = cache_inputs(program)
        consumers = {user for user in node.users if user.op != "output"}
        if consumers:
            first = next(user for user in program.graph.graph.nodes if user in consumers)
            surgery = Surgery(program, first, self._rules)
            gathered = surgery.call(ops.gather_latents, (node, block_table), f"{first.name}_past")
            node.replace_all_uses_with(gathered, lambda user: user in consumers)
        if present is node:
            return  # a layer that appends nothing
        if present.op != "call_function":
            raise FxquantError(
                node.name,
                f"is returned as {present.name}, which no call computes.",
                "Return the latents that the layer appended to.",
            )
        surgery = Surgery(program, present, self._rules)
        written = surgery.call(ops.write_latents, (node, present, slot_mapping), f"{present.name}_written")
        present.append(written)
        output = program.graph.graph.output_node()
        output.args = (tuple(written if i == position else item for i, item in enumerate(program.graph.results)),)


def caches(program: Program) -> list[fx.Node]:
    """The inputs that hold latents, in layer order."""
    inputs = program.graph.graph.find_nodes(op="placeholder")
    return inputs[3 : -len(CACHE_INPUTS)] if is_paged(program) else inputs[3:]


def is_paged(program: Program) -> bool:
    """Whether the caches are in pages."""
    inputs = program.graph.graph.find_nodes(op="placeholder")
    return tuple(node.name for node in inputs[-len(CACHE_INPUTS) :]) == CACHE_INPUTS


def cache_inputs(program: Program) -> tuple[fx.Node, fx.Node, fx.Node]:
    """block_table, slot_mapping, seq_lens."""
    table, slots, lengths = program.graph.graph.find_nodes(op="placeholder")[-len(CACHE_INPUTS) :]
    return table, slots, lengths


def _add_inputs(program: Program) -> None:
    """The three inputs; caches come in pages of one latent, so that no size is new to the shape rules."""
    graph = program.graph.graph
    placeholders = graph.find_nodes(op="placeholder")
    batch, sequence = placeholders[0].meta["val"].shape
    for node in placeholders[3:]:
        past, width = node.meta["val"].shape[1:]
        node.meta["val"] = node.meta["val"].new_empty((past, 1, width))
    first = placeholders[0].meta
    past = placeholders[3].meta["val"].shape[0] if len(placeholders) > 3 else 0
    shapes = {"block_table": (batch, past), "slot_mapping": (batch, sequence), "seq_lens": (batch,)}
    for name in CACHE_INPUTS:
        if name in program.names:
            raise FxquantError(name, "is the name of another value of the graph.", "Rename its module.")
        with graph.inserting_before(placeholders[-1].next):
            node = graph.placeholder(name)
        program.names.add(name)
        node.meta = first | {"val": first["val"].new_empty(shapes[name], dtype=torch.int32)}
        placeholders.append(node)
