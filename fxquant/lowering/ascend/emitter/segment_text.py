"""Text of one segment: its statements as source lines, and the weight table entries that they read."""

import os.path
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fxquant.errors import FxquantError
from fxquant.lowering.ascend.calls import Call, assignment
from fxquant.lowering.ascend.emitter.structure import Names, Segment
from fxquant.lowering.ascend.emitter.values import drops_last_dimension, is_int32
from fxquant.program.operands import operand
from fxquant.program.program import Program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe

CHANGED = "The graph file was edited, or a pass has a bug: compile again."
"""Remedy for graphs that come from a file, which may have been edited."""


@dataclass
class Writer:
    """Gives statements their operands, and collects weights, functions and lines.

    float32   values that stay float32 (`values.float32_values`)
    names     local variables of the segment's values
    weights   key of `w` → source of its entry in the segment's weight table
    used      names of the emitter's own functions that the text calls
    lines     the source so far, not indented
    """

    program: Program
    segment: Segment
    names: Names
    float32: set[fx.Node]
    weights: dict[str, Call] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    lines: list[str] = field(default_factory=list)

    def assign(self, target: str, value: Call | str) -> None:
        """Append the statement `target = value`."""
        self.lines += assignment(target, value)

    def value(self, node: Any, layout: str = "floating") -> str:
        """Source of an operand without conversion: a variable, or a parameter in `layout`."""
        if node.op == "get_attr":
            return self.weight(node, layout)
        return self.names.variables[node]

    def floating(self, node: fx.Node, layout: str = "floating") -> str:
        """Source of an operand in the dtype in which the model runs."""
        text = self.value(node, layout)
        return f"{text}.to(dtype)" if node in self.float32 else text

    def graph_layout(self, node: fx.Node) -> str:
        """Source of an operand with the shape and dtype that it has in the graph, for aten calls."""
        text = self.value(node)
        if drops_last_dimension(node):
            return f"{text}.unsqueeze(-1)"
        return f"{text}.long()" if is_int32(node) else text

    def weight(self, node: fx.Node, layout: str, beside: tuple[fx.Node, ...] = ()) -> str:
        """`w["…"]` for a parameter of the graph: `layout` of its stored tensors and those of parameters `beside` it."""
        parameters = [self.program.parameters[str(parameter_node.target)] for parameter_node in (node, *beside)]
        key, relative = self._relative(str(node.target))
        relative = relative and all(str(other.target).startswith(self.segment.prefix) for other in beside)
        template, experts = template_of(parameters[0].names)
        stacked = parameters[0].stacked
        names = (template if stacked else parameters[0].names[0], *(parameter.names[0] for parameter in parameters[1:]))
        names = tuple(name.removeprefix(self.segment.prefix if relative else "") for name in names)
        return self._entry(key, layout, names, experts if stacked else "0", relative)

    def computed(self, recipe: Recipe, suffix: str, layout: str, stored: tuple[str, ...]) -> str:
        """`w["<module>.<suffix>"]` [experts, …]: `layout` of the tensors with roles `stored` of a recipe's modules."""
        module, relative = self._relative(recipe.module)
        template, experts = template_of(recipe.modules)
        template = template.removeprefix(self.segment.prefix if relative else "")
        names = tuple(tensor_name(template, role) for role in stored)
        return self._entry(tensor_name(module, suffix), layout, names, experts, relative)

    def _relative(self, path: str) -> tuple[str, bool]:
        relative = path.startswith(self.segment.prefix)
        return path.removeprefix(self.segment.prefix) if relative else path, relative

    def _entry(self, key: str, layout: str, names: tuple[str, ...], experts: str, relative: bool) -> str:
        arguments = [layout]
        if names and names != (key,):
            quoted = ", ".join(f'"{name}"' for name in names)
            arguments.append(f"({quoted},)" if len(names) == 1 else f"({quoted})")
        if experts != "0":
            arguments.append(f"experts={experts}")
        if not relative:
            arguments.append("absolute=True")
        self.used |= {layout}
        entry = Call("Stored", tuple(arguments))
        # a parameter that is read in two layouts has two entries
        if self.weights.setdefault(key, entry) != entry:
            key = f"{key} {layout}"
            self.weights[key] = entry
        return f'w["{key}"]'

    def call(self, function: str, *arguments: str) -> Call:
        """A call of one of the emitter's own functions."""
        self.used.add(function)
        return Call(function, arguments)

    def operand(self, node: fx.Node, name: str) -> Any:
        """The operand of a call by its schema's name."""
        return operand(node, name)

    def recipe(self, weight: fx.Node) -> Recipe:
        """The recipe that makes a quantized weight."""
        return self.program.recipes[self.program.parameters[str(weight.target)].module]

    def fail(self, node: fx.Node, fact: str, remedy: str = "") -> FxquantError:
        """The error about `node`, for the caller to raise."""
        return FxquantError(node.meta.get("module") or node.name, fact, remedy)


def template_of(names: tuple[str, ...]) -> tuple[str, str]:
    """A pattern with `{}` where names differ, and its values: a count, or the source of a tuple."""
    start = os.path.commonprefix(names)
    if len(names) == 1:
        return start, "1"
    rests = [name.removeprefix(start) for name in names]
    end = os.path.commonprefix([rest[::-1] for rest in rests])[::-1]
    middles = [rest.removesuffix(end) for rest in rests]
    if middles == [str(index) for index in range(len(names))]:
        return f"{start}{{}}{end}", str(len(names))
    return f"{start}{{}}{end}", repr(tuple(middles))
