"""Form writer: recipe and form → the calls of a quantized linear, for `quantize-linear` and `quantize-experts`."""

from typing import Any

from torch import fx

from fxquant.errors import InternalError
from fxquant.ops.linear_forms import Form, Step
from fxquant.ops.quantized import GROUPED, LINEAR_FORMS
from fxquant.program.node_builder import Surgery
from fxquant.schemes.schemes import Recipe, tensor_specs


def form_of(recipe: Recipe) -> Form:
    """The form of a linear. Raises InternalError for a scheme that has none."""
    bits, activation = recipe.scheme.weight_bits, recipe.scheme.activation
    if bits is None or (bits, activation) not in LINEAR_FORMS:
        raise InternalError(recipe.module, f"linears have no form of {recipe.scheme}")
    return LINEAR_FORMS[bits, activation]


def expert_form(recipe: Recipe) -> Form | None:
    """The same on rows sorted by expert; None for a scheme that routed experts cannot have."""
    form = form_of(recipe)
    if any(step.operator not in GROUPED for step in form):
        return None
    return tuple(Step(GROUPED[step.operator], step.gives, step.names) for step in form)


class FormWriter:
    """Writes forms into a program; a step that takes no tensor of the linear is written once per input."""

    def __init__(self) -> None:
        self._shared: dict[tuple[Any, ...], dict[str, fx.Node]] = {}

    def write(
        self, surgery: Surgery, recipe: Recipe, form: Form, values: dict[str, fx.Node], name: str, last: str = ""
    ) -> fx.Node:
        """The node that gives the linear's result, before the surgery's site.

        values  operand → node: `x`, and `counts` of rows sorted by expert
        name    of the linear, for the names of nodes; `last`: the name of the last one, if it does not follow from it
        """
        for step in form:
            if set(step.arguments) <= values.keys():
                values = values | self.shared(surgery, step, values)
            else:
                called = last if last and step is form[-1] else f"{name}_{step.names[0]}"
                node = surgery.call(step.operator, _arguments(surgery, recipe, step, values), called)
                values = values | _results(surgery, step, node, name)
        return values[form[-1].gives[0]]

    def shared(self, surgery: Surgery, step: Step, values: dict[str, fx.Node]) -> dict[str, fx.Node]:
        """The results of a step that takes `values` alone: operand that each is for → node."""
        arguments = tuple(values[argument] for argument in step.arguments)
        key = (step.operator, *arguments)
        if key not in self._shared:
            name = arguments[0].name
            node = surgery.call(step.operator, arguments, f"{name}_{step.names[0]}")
            self._shared[key] = _results(surgery, step, node, name)
        return self._shared[key]


def _arguments(surgery: Surgery, recipe: Recipe, step: Step, values: dict[str, fx.Node]) -> list[fx.Node | None]:
    """Arguments in the order of the schema, without None at the end."""
    stored, given = tensor_specs(recipe), list[fx.Node | None]()
    for argument in step.operator._schema.arguments:
        if argument.name in values:
            given.append(values[argument.name])
        elif argument.name in stored:
            given.append(surgery.parameter(recipe, argument.name))
        elif argument.has_default_value():
            given.append(None)
        else:
            raise InternalError(recipe.module, f"{step.operator}: {recipe.scheme} has no {argument.name}")
    while given[-1] is None:
        given.pop()
    return given


def _results(surgery: Surgery, step: Step, node: fx.Node, name: str) -> dict[str, fx.Node]:
    several = len(step.gives) > 1
    nodes = surgery.outputs(node, [f"{name}_{part}" for part in step.names[1:]]) if several else [node]
    return dict(zip(step.gives, nodes, strict=True))
