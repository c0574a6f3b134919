"""A program as text: one line a call, with its shape, its inputs and the disk names of its parameters."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.naming import operator_name
from fxquant.program import Program
from fxquant.program_file import SYMBOLS

SHORT = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16", torch.int8: "i8", torch.int32: "i32"}
SHORT |= {torch.int64: "i64", torch.bool: "bool"}


def format_program(program: Program, block: str | None = None) -> Iterator[str]:
    """Lines of the whole graph or of one block."""
    current = None
    names = _size_names(program)
    for node in program.graph.graph.nodes:
        if node.op != "call_function" or block not in (None, node.meta["block"]):
            continue
        if node.meta["block"] != current:
            current = node.meta["block"]
            yield f"── {current} " + "─" * max(0, 100 - len(current))
        yield f"{node.name}{_type(node.meta.get('val'), names)} = {operator_name(node)}({_arguments(node, program)})"


def _size_names(program: Program) -> dict[str, str]:
    """How a dynamic size prints → its name."""
    names = {str(size): name for name, size in SYMBOLS.items()}
    inputs = [node.meta["val"] for node in program.graph.graph.nodes if node.op == "placeholder"]
    if any(isinstance(size, torch.SymInt) for size in inputs[0].shape):
        names = {str(inputs[0].shape[0]): "batch", str(inputs[0].shape[1]): "sequence"}
        names |= {str(value.shape[1]): "past" for value in inputs[3:]} | {str(inputs[1].shape[1]): "total"}
    return names


def _type(value: Any, names: dict[str, str]) -> str:
    if not isinstance(value, Tensor):
        return ""
    sizes = [_size(size, names) for size in value.shape]
    return f": {SHORT.get(value.dtype, str(value.dtype))}[{', '.join(sizes)}]"


def _size(size: Any, names: dict[str, str]) -> str:
    text = str(size)
    if not isinstance(size, torch.SymInt):
        return text
    for symbol, name in names.items():
        text = text.replace(symbol, name)
    return text


def _arguments(node: fx.Node, program: Program) -> str:
    parts = [_argument(value, program) for value in node.args]
    return ", ".join(parts + [f"{key}={_argument(value, program)}" for key, value in node.kwargs.items()])


def _argument(value: Any, program: Program) -> str:
    if isinstance(value, list | tuple):
        shown = [_argument(item, program) for item in value]
        return "[" + ", ".join(shown if len(shown) <= 4 else [*shown[:2], "…", shown[-1]]) + "]"
    if not isinstance(value, fx.Node):
        return f"{value:.6g}" if isinstance(value, float) else str(value)
    if value.op != "get_attr":
        return value.name
    parameter = program.parameters[str(value.target)]
    return f"‹{value.target}›" if not parameter.stacked else f"‹{value.target} ×{len(parameter.names)}›"
