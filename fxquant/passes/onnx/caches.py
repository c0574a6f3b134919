"""Caches of a program that is deployed to ONNX: what a layer appends to them, and inputs and outputs in their place."""

from dataclasses import dataclass

import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.program.node_names import rename
from fxquant.program.operands import arguments
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs

ATEN = torch.ops.aten
PARTS = ("key", "value")


@dataclass(frozen=True)
class Appended:
    """The cache of one layer: its input, and what is returned: the input and new latents [B, S, width] behind it.

    index  of the layer
    """

    index: int
    past: fx.Node
    present: fx.Node
    new: fx.Node


def appended_caches(program: Program, cache: str) -> list[Appended]:
    """The cache of every layer. Raises FxquantError, naming the option, for a layer that does not append to it."""
    pairs = zip(cache_inputs(program), program.graph.results[1:], strict=True)
    return [_appended(index, past, present, cache) for index, (past, present) in enumerate(pairs)]


def _appended(index: int, past: fx.Node, present: fx.Node, cache: str) -> Appended:
    given = arguments(present) if present.target == ATEN.cat.default else {}
    joined, along = given.get("tensors"), given.get("dim") in (1, -2)
    if isinstance(joined, list | tuple) and len(joined) == 2 and joined[0] is past and along and len(past.users) == 1:
        new = joined[1]
        if isinstance(new, fx.Node):
            return Appended(index, past, present, new)
    fact = f"layer {index} returns {present.name} as its cache, which is not the cache it got with new latents behind."
    raise FxquantError(f"--onnx-cache {cache}", fact, "Pass --onnx-cache latent, which takes any cache.")


def add_inputs(program: Program, cache: Appended, shapes: tuple[tuple[int, ...], ...]) -> list[fx.Node]:
    """Inputs key and value of these shapes, before the one that they replace."""
    inputs = []
    for part, shape in zip(PARTS, shapes, strict=True):
        with program.graph.graph.inserting_before(cache.past):
            node = program.graph.graph.placeholder(f"{cache.past.name}_{part}")
        rename(program.names, node, f"{cache.past.name}_{part}")
        node.meta = cache.past.meta | {"val": cache.past.meta["val"].new_empty(shape)}
        inputs.append(node)
    return inputs


def return_instead(program: Program, grown: dict[fx.Node, list[fx.Node]]) -> None:
    """Return these values in place of each cache. Inputs that nothing reads are dropped."""
    output = program.graph.graph.output_node()
    logits, *presents = program.graph.results
    output.args = ((logits, *(value for present in presents for value in grown[present])),)
    program.graph.graph.eliminate_dead_code()
    for node in cache_inputs(program):
        if not node.users:
            program.graph.graph.erase_node(node)
            program.names.discard(node.name)
    program.drop_unused_parameters()
