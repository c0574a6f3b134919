"""Operands of calls, read by the names of the operator's schema: `operand(node, "weight")`."""

import operator
from functools import cache
from typing import Any

from torch import fx

from fxquant.errors import InternalError


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a call of a torch operator, by name in the order of its schema; defaults are filled in.

    Raises InternalError for any other call.
    """
    given, keywords, count = node.args, node.kwargs, len(node.args)
    return {
        name: given[position] if position < count else keywords.get(name, default)
        for name, (position, default) in _signature(node).items()
    }


def operand(node: fx.Node, name: str) -> Any:
    """One of `arguments`. Raises InternalError if the operator has no such argument."""
    position, default = _place(node, name)
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def operand_node(node: fx.Node, name: str) -> fx.Node:
    """An operand that is a node: a call, an input or a parameter. Raises InternalError for a number or None."""
    value = operand(node, name)
    if not isinstance(value, fx.Node):
        raise InternalError(node.name, f"{node.target}: its argument {name} is {value!r}, not a node.")
    return value


def set_operand(node: fx.Node, name: str, value: Any) -> None:
    """Set the argument `name` of a call to `value`; omitted arguments before it get their defaults."""
    position, _ = _place(node, name)
    if name in node.kwargs:
        node.update_kwarg(name, value)
        return
    values = list(arguments(node).values())[: max(position + 1, len(node.args))]
    values[position] = value
    node.args = tuple(values)


def item_of(node: fx.Node) -> tuple[fx.Node, int | None]:
    """The call that gives a value, and the index of that result; `node` itself and None for the whole result."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        index: Any = node.args[1]
        return node.args[0], index
    return node, None


def producer(node: fx.Node) -> tuple[Any, int | None]:
    """As `item_of`, with the operator in place of the call."""
    call, index = item_of(node)
    return call.target, index


def _place(node: fx.Node, name: str) -> tuple[int, Any]:
    signature = _signature(node)
    if name not in signature:
        raise InternalError(node.name, f"{node.target} has no argument {name}; it has {', '.join(signature)}.")
    return signature[name]


def _signature(node: fx.Node) -> dict[str, tuple[int, Any]]:
    if not hasattr(node.target, "_schema"):
        raise InternalError(node.name, f"{node.target} is not a torch operator, so its arguments have no names.")
    return _signature_of(node.target)


@cache
def _signature_of(target: Any) -> dict[str, tuple[int, Any]]:
    """Name → position and default; read once per operator, because graphs have thousands of its calls."""
    listed = enumerate(target._schema.arguments)
    return {argument.name: (position, argument.default_value) for position, argument in listed}
