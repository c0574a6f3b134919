"""aten calls: source of all calls that are not fxq operators (aten operators of a user's module, sizes, tuple items).

torch_npu implements aten, so a call without an entry here is written as `torch.ops.aten.<name>.<overload>(…)`.
"""

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.lowering.ascend.calls import Call
from fxquant.lowering.ascend.emitter.segment_text import Writer
from fxquant.program.operands import arguments, item_of, operand

INFIX = {
    "aten.add.Tensor": "+",
    "aten.sub.Tensor": "-",
    "aten.mul.Tensor": "*",
    "aten.div.Tensor": "/",
    "aten.gt.Scalar": ">",
    "aten.lt.Scalar": "<",
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.floordiv: "//",
    operator.truediv: "/",
}
"""Operators with two operands and no keywords."""

TORCH = {
    "abs", "bmm", "cat", "chunk", "clamp", "cos", "exp", "flatten", "flip", "gather", "log", "matmul", "max", "maximum",
    "mean", "min", "minimum", "neg", "ones_like", "permute", "pow", "relu", "reshape", "rsqrt", "sigmoid", "sin",
    "softmax", "split", "split_with_sizes", "sqrt", "square", "squeeze", "stack", "sum", "tanh", "topk", "transpose",
    "tril", "triu", "unbind", "unflatten", "unsqueeze", "where", "zeros_like",
}  # fmt: skip
"""aten operators whose functions in `torch` take the same arguments in the same order."""

FUNCTIONAL = {"gelu", "silu", "softplus"}
"""The same, in torch.nn.functional."""

METHODS = {"expand", "repeat", "to", "view"}
"""The same, as methods of the first argument."""


END = 2**63 - 1
"""The `end` by which aten means "to the end"."""


def aten_call(writer: Writer, node: fx.Node) -> Call | str:
    """Right-hand side for any call of aten or of Python's operator module."""
    made_by, index = item_of(node)
    if index is not None:
        return f"{writer.value(made_by)}[{index}]"
    target = node.target if node.target in INFIX else str(node.target)
    if target in INFIX and not node.kwargs and len(node.args) == 2:  # keywords such as alpha need a call
        left, right = (code(writer, argument) for argument in node.args)
        return f"{left} {INFIX[target]} {right}"
    name = getattr(node.target, "_opname", "")
    if name == "sym_size":
        return f"{code(writer, operand(node, 'self'))}.shape[{operand(node, 'dim')}]"
    if target == "aten.slice.Tensor":
        return _slice(writer, node)
    places = tuple(code(writer, argument) for argument in node.args)
    keywords = tuple(f"{key}={code(writer, value)}" for key, value in node.kwargs.items() if not _is_place(key))
    if name in METHODS:
        return Call(f"{places[0]}.{name}", places[1:] + keywords)
    if not name:
        raise writer.fail(node, f"{node.target} is not a torch operator.", "Write it with torch functions.")
    return Call(_function(node.target, name), places + keywords + _device(writer, node))


def _slice(writer: Writer, node: fx.Node) -> str:
    """`x[:, 2:5]`."""
    given = arguments(node)
    first = "" if given["start"] in (0, None) else code(writer, given["start"])
    last = "" if given["end"] in (None, END) else code(writer, given["end"])
    every = "" if given["step"] == 1 else f":{code(writer, given['step'])}"
    before = ":, " * (int(given["dim"]) % node.meta["val"].dim())
    return f"{writer.graph_layout(given['self'])}[{before}{first}:{last}{every}]"


def _function(target: Any, name: str) -> str:
    if target.namespace == "aten" and name in TORCH:
        return f"torch.{name}"
    if target.namespace == "aten" and name in FUNCTIONAL:
        return f"F.{name}"
    return f"torch.ops.{target.namespace}.{name}.{target._overloadname}"


def _is_place(key: str) -> bool:
    """Keywords to drop: the graph was traced on the meta device; `_device` writes the device of new tensors."""
    return key in ("device", "pin_memory", "layout")


def _device(writer: Writer, node: fx.Node) -> tuple[str, ...]:
    """Device keyword of a call without tensor operands: it creates its tensor where the segment's inputs are."""
    made_of_others = any(isinstance(argument.meta.get("val"), Tensor) for argument in node.all_input_nodes)
    return () if made_of_others else (f"device={writer.names.inputs[0].name}.device",)


def code(writer: Writer, argument: Any) -> str:
    """Source of one argument."""
    if isinstance(argument, fx.Node):
        return writer.graph_layout(argument)
    if isinstance(argument, list | tuple):
        items = ", ".join(code(writer, item) for item in argument)
        return f"[{items}]"
    if isinstance(argument, float) and not math.isfinite(argument):
        return f'float("{argument}")'
    if argument is None or isinstance(argument, bool | int | float | torch.dtype):
        return repr(argument)
    if isinstance(argument, str):
        return f'"{argument}"'
    raise writer.fail(writer.segment.calls[0], f"{argument!r} cannot be written as source code.")
