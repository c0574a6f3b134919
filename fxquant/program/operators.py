"""Operator table, closed: the operators that a program may call, by their names in graph files."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.inputs.limits import SIZE
from fxquant.program.aten_operators import ATEN

PYTHON = ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg")
"""Python's operators: on sizes, and `getitem` on the results of a call."""


def _overload(name: str) -> Any:
    namespace, _, rest = name.partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


OPERATORS: dict[str, Any] = {
    **{f"fxq::{target._opname}.{target._overloadname}": target for target in ops.REFERENCES},
    **{name: _overload(name) for name in ATEN},
    **{f"python::{name}": getattr(operator, name) for name in PYTHON},
}
"""`library::name.overload`, or `python::name` → what is called."""
NAMES: dict[Any, str] = {target: name for name, target in OPERATORS.items()}


def target_name(node: fx.Node) -> str:
    """The name of a call's operator; another node's target as it is. Raises FxquantError outside of the table."""
    if node.op != "call_function":
        return str(node.target)
    name = NAMES.get(node.target)
    if name is None:
        place = node.meta.get("module") or node.name
        way_out = "Write it with the torch functions that docs/model-file.md lists, or declare the module in LEAVES."
        raise FxquantError(place, f"its forward calls {node.target}, which no compiled graph may call.", way_out)
    return name


def call_python(name: str, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One of Python's operators on numbers below `SIZE`, or an item of a list. Raises ValueError for anything else."""
    if kwargs:
        raise ValueError(f"{name} takes no keywords")
    if name == "python::getitem":
        items, index = args
        if not isinstance(items, list | tuple) or type(index) is not int:
            raise ValueError(f"{name} takes the results of a call, and a number")
        return items[index]
    if not all(type(arg) in (int, float) for arg in args):
        raise ValueError(f"{name} takes sizes")
    value = function(*args)
    if not abs(value) < SIZE:
        raise ValueError(f"{name} gives {value}, sizes are less than {SIZE}")
    return value
