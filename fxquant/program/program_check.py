"""Program check: what must hold for a graph after every pass, whoever wrote the pass."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import InternalError
from fxquant.program.program import Program, made_parameters
from fxquant.program.shape_inference import ShapeRules


class ProgramCheck:
    """Checks a program; nodes that did not change since the last check are skipped.

    Raises InternalError, with the node and `after`, unless
    - the graph is well formed, and reads no parameter that the program does not have;
    - every call's value has the dtype and shape that its operator gives for its arguments;
    - a call that multiplies by integers, and the one that scales the sums, read tensors of one linear;
    - integers that a static linear multiplies were quantized with its own range.
    """

    def __init__(self) -> None:
        self._rules = ShapeRules()
        self._seen: dict[fx.Node, tuple[Any, ...]] = {}

    def __call__(self, program: Program, after: str) -> None:
        """`after` names the pass that came last."""
        try:
            program.graph.lint()
        except RuntimeError as error:
            raise InternalError(f"after {after}", str(error).splitlines()[0]) from None
        makers = {target: recipe.module for recipe in program.recipes.values() for target in made_parameters(recipe)}
        seen: dict[fx.Node, tuple[Any, ...]] = {}
        for node in program.graph.graph.nodes:
            read = tuple(operand.meta.get("val") for operand in node.all_input_nodes)
            seen[node] = (node.target, node.args, node.kwargs, node.meta.get("val"), read)
            # a pass may replace a parameter's tensor and leave its node as it is
            if node.op == "get_attr" or not _same(self._seen.get(node), seen[node]):
                reason = self._value(node, program)
                if reason is not None:
                    raise InternalError(f"{node.name}, after {after}", reason)
        # every time: a pass may change recipes without touching a node
        for node in program.graph.graph.nodes:
            reason = _ownership(node, program, makers) if node.op == "call_function" else None
            if reason is not None:
                raise InternalError(f"{node.name}, after {after}", reason)
        self._seen = seen

    def _value(self, node: fx.Node, program: Program) -> str | None:
        """Why the recorded value of a node is not what it gives."""
        if node.op == "get_attr":
            tensor = program.graph.tensors.get(str(node.target))
            if tensor is None or node.target not in program.parameters:
                return f"reads {node.target}, which is not a parameter"
            return _difference(node.meta.get("val"), tensor)
        if node.op != "call_function":
            return None
        if "val" not in node.meta:
            return "has no checked shape"
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: operand.meta.get("val"))
        try:
            given = self._rules.call(node.target, tuple(args), kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            return f"its operator refuses its arguments: {str(error).strip().splitlines()[0]}"
        return _difference(node.meta["val"], given)


def _same(old: tuple[Any, ...] | None, new: tuple[Any, ...]) -> bool:
    """Equal arguments, and the same value objects: tensors are not compared."""
    if old is None or old[:3] != new[:3] or old[3] is not new[3] or len(old[4]) != len(new[4]):
        return False
    return all(before is after for before, after in zip(old[4], new[4], strict=True))


def _difference(value: Any, given: Any) -> str | None:
    """Why `value` is not of the dtype and shape of `given`."""
    if isinstance(given, list | tuple):
        if not isinstance(value, list | tuple) or len(value) != len(given):
            return f"gives {len(given)} values"
        return next((reason for pair in zip(value, given, strict=True) if (reason := _difference(*pair))), None)
    if not isinstance(given, Tensor):
        return None
    if not isinstance(value, Tensor):
        return f"its value is {value!r}, expected {_said(given)}"
    same = value.dtype is given.dtype and _sizes(value) == _sizes(given)
    return None if same else f"its value is {_said(value)}, expected {_said(given)}"


def _sizes(tensor: Tensor) -> list[Any]:
    """Symbols by their expressions: comparing them would guard the trace."""
    return [size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in tensor.shape]


def _said(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{_sizes(tensor)}"


def _ownership(node: fx.Node, program: Program, makers: dict[str, str]) -> str | None:
    """Why tensors of different linears meet in a call."""
    own = set(_modules(node, makers))
    if not own:
        return None
    if _gives(node, torch.int32):
        if len(own) > 1:
            return f"multiplies by tensors of {' and '.join(sorted(own))}"
        return _foreign_range(node, next(iter(own)), program, makers)
    sums = {
        module
        for operand in node.all_input_nodes
        if _gives(operand, torch.int32)
        for module in _modules(operand, makers)
    }
    return (
        f"scales sums of {', '.join(sorted(sums))} by tensors of {', '.join(sorted(own))}"
        if sums and own - sums
        else None
    )


def _foreign_range(node: fx.Node, module: str, program: Program, makers: dict[str, str]) -> str | None:
    """Why the integers that `node` multiplies by the weight of `module` were not quantized with its range."""
    for operand in node.all_input_nodes:
        for other in _modules(operand, makers) if _gives(operand, torch.int8) else ():
            if program.recipes[other].activation != program.recipes[module].activation:
                return f"multiplies integers quantized with the range of {other} by the weight of {module}"
    return None


def _modules(node: fx.Node, makers: dict[str, str]) -> Iterator[str]:
    """Modules of the quantized tensors that a call reads."""
    if node.op == "call_function":
        yield from (makers[str(operand.target)] for operand in node.all_input_nodes if str(operand.target) in makers)


def _gives(node: fx.Node, dtype: torch.dtype) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.dtype is dtype
