"""Last logits: which part of a graph runs over the last tokens alone, where `num_logits_to_keep` says how many."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import fx

from fxquant.errors import FxquantError
from fxquant.lowering.onnx.builder import Builder
from fxquant.lowering.onnx.shapes import Shapes
from fxquant.ops.by_token import BY_TOKEN
from fxquant.program.program import Program

NAME = "num_logits_to_keep"
KEEP_ALL = {NAME: torch.tensor(0)}
"""A value of the input, by the name of the input."""
KEPT = "kept"
"""Name of the dimension of the tokens that are left."""


@dataclass(frozen=True)
class Head:
    """The calls, logits last, that need of each token only its row of `hidden` [B, S, …]."""

    hidden: fx.Node
    calls: frozenset[fx.Node]


def find_head(program: Program, shapes: Shapes) -> Head:
    """As many calls before the logits as read one value. Raises FxquantError if there are none."""
    logits, calls, head = program.graph.results[0], set[fx.Node](), None
    for node in reversed(list(program.graph.graph.nodes)):
        mine = node is logits or (node.users and all(user in calls for user in node.users))
        if node.op != "call_function" or not mine or node.target not in BY_TOKEN:
            continue
        calls.add(node)
        read = {argument for call in calls for argument in call.all_input_nodes if argument.op != "get_attr"} - calls
        hidden = next(iter(read)) if len(read) == 1 else None
        if hidden is not None and logits in calls and _is_rows(hidden, shapes) and calls.issuperset(hidden.users):
            head = Head(hidden, frozenset(calls))
    if head is None:
        fact = f"the logits come of {logits.name}, which may mix tokens."
        raise FxquantError("--onnx-last-logits", fact, "Leave it out.")
    return head


def _is_rows(node: fx.Node, shapes: Shapes) -> bool:
    metas = shapes.outputs(node)
    return len(metas) == 1 and metas[0].dims[:2] == ("batch", "sequence")


def count_input() -> ir.Value:
    """int64, zero-dimensional: 0 keeps all. ONNX Runtime takes one number in one dimension, too."""
    return ir.Value(name=NAME, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64), metadata_props={"fx": NAME})


def keep_last(b: Builder, hidden: ir.Value, count: ir.Value) -> ir.Value:
    """The rows [B, kept, …] of the last `count` tokens of hidden [B, S, …]."""
    start = b.op("Neg", b.op("Reshape", count, b.ints(-1)))
    return b.op("Slice", hidden, start, b.ints(np.iinfo(np.int64).max), b.ints(1))
