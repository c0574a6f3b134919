"""Emitted functions: segments → Python functions, one per distinct text, so that layers of equal structure share it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.calls import INDENT, Call
from fxquant.lowering.ascend.emitted import composites, norm_composites, norm_layouts, weight_loading
from fxquant.lowering.ascend.emitter.segment_text import CHANGED, Writer
from fxquant.lowering.ascend.emitter.statements import right_hand_side
from fxquant.lowering.ascend.emitter.structure import AFTER, BEFORE, BETWEEN, Input, Names, Segment, segments, unique
from fxquant.lowering.ascend.emitter.values import float32_values
from fxquant.program.operands import item_of
from fxquant.program.program import Program
from fxquant.schemes.schemes import Recipe

Weights = tuple[tuple[str, Call], ...]
"""Key of `w` → source of its table entry."""

MOE = (ops.moe_experts, ops.moe_gate, ops.moe_init_routing)


@dataclass(frozen=True)
class Function:
    """One function of the emitted module. `weights`: key of `w` → source of its table entry."""

    name: str
    inputs: tuple[str, ...]
    lines: tuple[str, ...]
    weights: Weights
    used: frozenset[str]


@dataclass(frozen=True)
class Emitted:
    """A segment, its function, and the graph's value of each argument and variable."""

    segment: Segment
    function: Function
    inputs: tuple[Input, ...]
    variables: dict[str, fx.Node]


class Functions:
    """Makes the functions of one module; segments with the same text share them, across graphs too."""

    def __init__(self, emitted: Sequence[Emitted] = ()) -> None:
        self._known: dict[tuple, Function] = {}
        for function, segment in {call.function: call.segment for call in emitted}.items():
            self._known[_kind(segment), function.inputs, function.lines, function.weights] = function
        self._names = {function.name for function in self._known.values()}

    def of(self, program: Program, suffix: str = "", weights: Mapping[str, Weights] | None = None) -> list[Emitted]:
        """Every segment with its function, in graph order.

        suffix   for the names of functions that earlier graphs do not have
        weights  segment key → entries that the segment's table already has
        """
        float32 = float32_values(program)
        return [self._emitted(program, segment, float32, suffix, weights or {}) for segment in segments(program)]

    def _emitted(
        self, program: Program, segment: Segment, float32: set[fx.Node], suffix: str, weights: Mapping[str, Weights]
    ) -> Emitted:
        writer = Writer(program, segment, Names(program, segment, RESERVED), float32)
        writer.weights |= dict(weights.get(segment.key, ()))
        _write(writer)
        inputs = writer.names.inputs
        text = (tuple(i.name for i in inputs), tuple(writer.lines), tuple(writer.weights.items()))
        key = (_kind(segment), *text)
        if key not in self._known:
            name = unique(_kind(segment) + suffix, self._names)
            self._known[key] = Function(name, *text, frozenset(writer.used))
        variables = {name: node for node, name in writer.names.variables.items()}
        return Emitted(segment, self._known[key], inputs, variables)


def functions(program: Program) -> list[Emitted]:
    """Every segment with its function, in graph order."""
    return Functions().of(program)


def own_names(module: ModuleType) -> dict[str, Any]:
    """Functions and classes that a module defines, in its order."""
    return {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}


RESERVED = set().union(*(own_names(module) for module in (composites, norm_composites, weight_loading, norm_layouts)))


def _write(writer: Writer) -> None:
    module = None
    for node in writer.segment.calls:
        made_by, index = item_of(node)
        if index is not None and _unpacked(writer.segment, made_by):
            continue
        start = len(writer.lines)  # float experts write statements before their own
        value = right_hand_side(writer, node)
        if value is None:
            continue
        writer.assign(_target(writer, node, value), value)
        if node.meta["module"] != module:
            module = node.meta["module"]
            writer.lines.insert(start, f"# {_comment(writer, module)}")
    outputs = [writer.names.variables[node] for node in writer.segment.outputs]
    writer.lines.append(f"return {', '.join(outputs)}")


def _unpacked(segment: Segment, node: fx.Node) -> bool:
    """Whether each output of a call becomes a variable."""
    own = [index for user in node.users if user in segment.calls and (index := item_of(user)[1]) is not None]
    return node in segment.calls and len(own) == len(node.users) == len(set(own))


def _target(writer: Writer, node: fx.Node, call: Call | str) -> str:
    value = node.meta.get("val")
    outputs: Sequence[int | None] = call.outputs if isinstance(call, Call) else ()
    if not isinstance(value, list | tuple) or not _unpacked(writer.segment, node):
        if outputs:
            raise writer.fail(node, "its results are not unpacked one by one.", CHANGED)
        return writer.names.variables[node]
    items = {item_of(user)[1]: writer.names.variables[user] for user in node.users}
    targets = [items.get(index, "_") if index is not None else "_" for index in outputs or range(len(value))]
    return ", ".join(targets) if len(targets) > 1 else f"({targets[0]},)"


def _comment(writer: Writer, module: str) -> str:
    """Comment over a group of statements: their module, and the schemes of its linears."""
    recipes = writer.program.recipes
    inside = (
        recipe for path, recipe in recipes.items() if path.rpartition(".")[0] == module and len(recipe.modules) > 1
    )
    schemes = [scheme_text(recipe) for recipe in ([recipes[module]] if module in recipes else inside)]
    prefix = writer.segment.prefix
    path = "the layer itself" if module == prefix[:-1] else module.removeprefix(prefix)
    return f"{path}: {', '.join(dict.fromkeys(schemes))}" if schemes else path


def scheme_text(recipe: Recipe) -> str:
    """The scheme, with its group size if it has one."""
    return f"{recipe.scheme}, groups of {recipe.group_size}" if recipe.group_size else str(recipe.scheme)


def _kind(segment: Segment) -> str:
    if segment.prefix:
        return "moe_block" if any(node.target in MOE for node in segment.calls) else "dense_block"
    return segment.key if segment.key in (BEFORE, AFTER) else BETWEEN


def signature(function: Function) -> str:
    """`def name(w, dtype, …):`"""
    return f"def {function.name}({', '.join(('w', 'dtype', *function.inputs))}):"


def code(function: Function, docstring: str) -> str:
    """The whole function."""
    lines = [signature(function), f'{INDENT}"""{docstring}"""', *(INDENT + line for line in function.lines)]
    return "\n".join(lines) + "\n"
