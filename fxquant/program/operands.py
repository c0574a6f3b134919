"""Reading calls of the graph."""

import operator
from typing import Any

from torch import fx


def operands(node: fx.Node) -> tuple[Any, ...]:
    """`node.args`, for code that knows what an operator takes."""
    return node.args


def producer(node: fx.Node) -> tuple[Any, int | None]:
    """The operator that computes a value, and which of its outputs that is (None: the whole)."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return operands(node)[0].target, operands(node)[1]
    return node.target, None
