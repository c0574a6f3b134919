"""Segments of the flat graph: consecutive calls of one block."""

import keyword
from dataclasses import dataclass

import torch
from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.emitter.values import is_residual
from fxquant.passes.npu.page_latents import CACHE_INPUTS, caches, is_paged
from fxquant.program.node_names import identifier
from fxquant.program.operands import arguments, item_of, producer
from fxquant.program.program import Program

BEFORE, BETWEEN, AFTER = "before", "between", "after"
"""Keys of segments that belong to no layer."""


@dataclass(frozen=True)
class Segment:
    """Consecutive calls of one block.

    key      unique name: the block's, with a number if a block has several segments
    prefix   prefix of the names of the block's parameters: "model.layers.3." or ""
    inputs   values from outside, in order of first use: placeholders and calls of earlier segments
    outputs  values that later segments or the graph's output read: first hidden states, last caches
    """

    key: str
    prefix: str
    calls: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def segments(program: Program) -> list[Segment]:
    """Segments with all calls of the graph, in order."""
    runs: list[tuple[str, list[fx.Node]]] = []
    for node in program.graph.graph.nodes:
        if node.op == "call_function":
            if not runs or runs[-1][0] != node.meta["block"]:
                runs.append((node.meta["block"], []))
            runs[-1][1].append(node)
    caches = program.graph.results[1:]
    keys: set[str] = set()
    result = []
    for position, (block, calls) in enumerate(runs):
        outside = BEFORE if position == 0 else AFTER if position == len(runs) - 1 else BETWEEN
        key = unique(block if is_layer(block) else outside, keys)
        result.append(_segment(block, calls, key, caches))
    return result


def _segment(block: str, calls: list[fx.Node], key: str, caches: tuple[fx.Node, ...]) -> Segment:
    own = set(calls)
    read = [argument for node in calls for argument in node.all_input_nodes]
    inputs = dict.fromkeys(node for node in read if node.op != "get_attr" and node not in own)
    outputs = [node for node in calls if any(user not in own for user in _consumers(node))]
    outputs.sort(key=lambda node: 2 if node in caches else is_rope_table(node))
    return Segment(key, f"{block}." if is_layer(block) else "", tuple(calls), tuple(inputs), tuple(outputs))


def _consumers(node: fx.Node) -> list[fx.Node]:
    """Users of a value; not the graph's output for a paged cache, which is written in place."""
    return [user for user in node.users if node.target != ops.write_latents or user.op != "output"]


def is_layer(block: str) -> bool:
    """Whether `meta["block"]` is the path of a layer; blocks outside the layers have no dot."""
    return "." in block


def is_rope_table(node: fx.Node) -> bool:
    """Whether it is the cosine or the sine of a rotary table."""
    operator, index = producer(node)
    return operator == ops.rope_table and index is not None


def unique(name: str, taken: set[str]) -> str:
    """`name`, or `name_2`, `name_3`, … if that is taken; adds it to `taken`."""
    candidate, count = name, 1
    while candidate in taken:
        count += 1
        candidate = f"{name}_{count}"
    taken.add(candidate)
    return candidate


@dataclass(frozen=True)
class Input:
    """An argument of a segment's function: the value of `node`, or the attention mask made from it."""

    name: str
    node: fx.Node
    hidden_keys: bool = False


RESERVED = {"w", "dtype", "torch", "F", "float", "x", "residual", "cos", "sin", "hidden_keys", "past", "pages", "_"}
"""Names that the text of a function uses, and those of its arguments."""


class Names:
    """Local variable names of one segment, without the block's own prefix."""

    def __init__(self, program: Program, segment: Segment, reserved: set[str]) -> None:
        self._taken = set(reserved) | RESERVED
        self.inputs = _inputs(program, segment)
        self.variables: dict[fx.Node, str] = {i.node: i.name for i in self.inputs if not i.hidden_keys}
        self._taken |= {i.name for i in self.inputs}
        prefix = f"{identifier(segment.prefix[:-1])}_" if segment.prefix else ""
        for node in segment.calls:
            self.variables[node] = self.local(node.name.removeprefix(prefix))

    def local(self, name: str) -> str:
        """A variable named `name`, or if that is taken or not allowed, a similar name."""
        usable = name.isidentifier() and not keyword.iskeyword(name)
        return unique(name if usable else f"_{name}", self._taken)


def _inputs(program: Program, segment: Segment) -> tuple[Input, ...]:
    """Arguments in reading order: values of earlier segments, rotary tables, the mask, caches."""
    placeholders = program.graph.graph.find_nodes(op="placeholder")
    taken: set[str] = set()
    ranked: list[tuple[int, Input]] = []
    for node in sorted(segment.inputs, key=lambda node: placeholders.index(node) if node in placeholders else -1):
        if reads_mask_for_attention(program, node, segment):
            ranked.append((2, Input("hidden_keys", node, hidden_keys=True)))
        if not all(is_attention_mask(program, node, user) for user in node.users if user in segment.calls):
            rank, name = _role(program, node)
            ranked.append((rank, Input(unique(name, taken), node)))
    return tuple(item for _, item in sorted(ranked, key=lambda pair: pair[0]))


def _role(program: Program, node: fx.Node) -> tuple[int, str]:
    """Rank among the arguments, and name, of an input."""
    if node.op == "placeholder" and node in caches(program):
        return 3, "pages" if is_paged(program) else "past"
    if node.op == "placeholder":
        return (4 + CACHE_INPUTS.index(node.name) if node.name in CACHE_INPUTS else 0), node.name
    return (1 if is_rope_table(node) else 0), base_name(node)


def base_name(node: fx.Node) -> str:
    """Name of a value outside of its own segment."""
    if is_rope_table(node):
        return "sin" if item_of(node)[1] else "cos"
    if is_residual(node):
        return "residual"
    return "size" if isinstance(node.meta["val"], torch.SymInt | int) else "x"


def reads_mask_for_attention(program: Program, node: fx.Node, segment: Segment) -> bool:
    """Whether a call of the segment takes `node` as the mask that `forward` makes once."""
    return any(is_attention_mask(program, node, user) for user in node.users if user in segment.calls)


def is_attention_mask(program: Program, node: fx.Node, user: fx.Node) -> bool:
    """Whether `user` is an attention over the model's own mask, with one query per input token."""
    input_ids, attention_mask = program.graph.graph.find_nodes(op="placeholder")[:2]
    if node is not attention_mask or user.target != ops.mla_attention:
        return False
    given = arguments(user)
    if given.pop("attention_mask") is not node:
        return False
    queries, tokens = given["q"].meta["val"].shape[1], input_ids.meta["val"].shape[1]
    return str(queries) == str(tokens) and all(arg is not node for arg in given.values())
