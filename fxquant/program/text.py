"""Program text: one line per call, with its shape, its inputs and the disk names of its parameters.

Inside a block, names are relative to it: `mlp_swiglu` in block `model.layers.3` is the node `layers_3_mlp_swiglu`, and
`‹mlp.gate.weight›` the parameter `model.layers.3.mlp.gate.weight`. `×8` marks a parameter of 8 tensors, one per expert.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import FxquantError
from fxquant.program.node_names import identifier, operator_name
from fxquant.program.operands import item_of
from fxquant.program.program import Program
from fxquant.program.schema import SYMBOLS

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8", torch.int32: "i32"}
SHORT |= {torch.int64: "i64", torch.bool: "bool"}


def format_program(program: Program, block: str | None = None) -> Iterator[str]:
    """Lines of the whole graph or of one block."""
    current = ""
    names = _size_names(program)
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or block not in (None, node.meta["block"]) or _is_part(node):
            continue
        if node.meta["block"] != current:
            current = node.meta["block"]
            yield f"── {current} " + "─" * max(0, 100 - len(current))
        results = ", ".join(_relative(part, current) + _type(part.meta.get("val"), names) for part in _results(node))
        yield f"{results} = {operator_name(node)}({_arguments(node, program)})"


def check_block(program: Program, block: str) -> None:
    """Raises FxquantError, with the most similar names, if the graph has no such block."""
    nodes = program.graph.graph.nodes
    names = list(dict.fromkeys(str(node.meta["block"]) for node in nodes if node.op == "call_function"))
    if block in names:
        return
    near = difflib.get_close_matches(block, names, n=3, cutoff=0.5)
    first = f"{len(names):,} blocks, {names[0]} … {names[-1]}" if names else "no block"
    way_out = f"Similar: {', '.join(near)}." if near else "Leave out --block to print all of them."
    raise FxquantError(f"--block {block}", f"the graph has no such block; it has {first}.", way_out)


def _results(node: fx.Node) -> list[fx.Node]:
    """The node, or the parts that its users take of the tuple it returns."""
    if isinstance(node.meta.get("val"), Tensor):
        return [node]
    return sorted((user for user in node.users if _is_part(user)), key=lambda user: item_of(user)[1] or 0) or [node]


def _is_part(node: fx.Node) -> bool:
    return item_of(node)[1] is not None


def _relative(node: fx.Node, block: str) -> str:
    return node.name.removeprefix(identifier(block) + "_") if node.meta.get("block") == block else node.name


def _size_names(program: Program) -> dict[str, str]:
    """How a dynamic size of a fresh trace prints → its name."""
    inputs = [node.meta["val"] for node in program.graph.graph.nodes if node.op == "placeholder"]
    names = {str(value.shape[1]): "past" for value in inputs[3:]} | {str(inputs[1].shape[1]): "total"}
    return names | {str(inputs[0].shape[0]): "batch", str(inputs[0].shape[1]): "sequence"}


def _type(value: Any, names: dict[str, str]) -> str:
    if not isinstance(value, Tensor):
        return ""
    return f": {SHORT.get(value.dtype, str(value.dtype))}[{', '.join(_size(size, names) for size in value.shape)}]"


def _size(size: Any, names: dict[str, str]) -> str:
    """A size by name: symbols of a fresh trace, or the sizes at which a stored graph was checked."""
    if isinstance(size, torch.SymInt):
        return re.sub(r"\bs\d+\b", lambda symbol: names.get(symbol[0], symbol[0]), str(size)).replace("*", "·")
    exact = {number: name for name, number in SYMBOLS.items()}
    tokens = SYMBOLS["batch"] * SYMBOLS["sequence"]
    if size % tokens == 0 and size:
        return f"{size // tokens}·batch·sequence" if size > tokens else "batch·sequence"
    return exact.get(int(size), str(size))


def _arguments(node: fx.Node, program: Program) -> str:
    block = node.meta["block"]
    parts = [_argument(value, program, block) for value in node.args]
    return ", ".join(parts + [f"{key}={_argument(value, program, block)}" for key, value in node.kwargs.items()])


def _argument(value: Any, program: Program, block: str) -> str:
    if isinstance(value, list | tuple):
        shown = [_argument(item, program, block) for item in value]
        return "[" + ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]]) + "]"
    if not isinstance(value, fx.Node):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if value.op != "get_attr":
        return _relative(value, block)
    parameter, target = program.parameters[str(value.target)], str(value.target).removeprefix(block + ".")
    return f"‹{target} ×{len(parameter.names)}›" if parameter.stacked else f"‹{target}›"
