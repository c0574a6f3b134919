"""Function table of the emitted model: one local function per distinct body, however many nodes call it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir

from fxquant.lowering.onnx.builder import CONTRIB, DOMAIN, OPSET, Body, Builder
from fxquant.lowering.onnx.functions import MEANINGS


class FunctionTable:
    """Functions in order of first use, named after their operator; `_1`, `_2`, … if constants make bodies differ.

    inline  there are none: each call is the nodes of the body
    """

    def __init__(self, inline: bool = False) -> None:
        self.inline = inline
        self.functions: list[ir.Function] = []
        self._by_arguments: dict[Any, ir.Function] = {}
        self._by_content: dict[bytes, ir.Function] = {}
        self._names: dict[str, int] = {}

    def call(self, builder: Builder, name: str, body: Body, arguments: Mapping[str, Any]) -> tuple[ir.Value, ...]:
        """Results of `body` for such arguments, by a call of its function or by its nodes."""
        if self.inline:
            result = body(builder, **arguments)
            return result if isinstance(result, tuple) else (result,)
        inputs = [value for value in arguments.values() if isinstance(value, ir.Value)]
        return builder.call(self.get(name, body, arguments), inputs)

    def get(self, name: str, body: Body, arguments: Mapping[str, Any]) -> ir.Function:
        """The function of `body` for such arguments: ir.Values become its inputs, everything else is built in."""
        key = (name, tuple((argument, _described(value)) for argument, value in arguments.items()))
        if key not in self._by_arguments:
            builder = Builder()
            formals = {argument: formal(argument, value) for argument, value in arguments.items()}
            result = body(builder, **formals)
            outputs = result if isinstance(result, tuple) else (result,)
            inputs = [value for value in formals.values() if isinstance(value, ir.Value)]
            function = self._by_arguments[key] = self.add(name, inputs, outputs, builder.nodes)
            function.doc_string = MEANINGS.get(body, "")
        return self._by_arguments[key]

    def add(
        self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], nodes: Sequence[ir.Node]
    ) -> ir.Function:
        """The function with this content, created on first use. Nodes that no output needs are left out."""
        # with types, functions that differ only in them would not be shared
        for value in inputs:
            value.shape, value.type = None, None
        forget_types(nodes)
        domains = {node.domain for node in nodes}
        imports = {"": OPSET} | {domain: 1 for domain in (DOMAIN, CONTRIB) if domain in domains}
        graph = ir.Graph(inputs, outputs, nodes=_needed(nodes, outputs), opset_imports=imports)
        function = ir.Function(DOMAIN, name, graph=graph, attributes=())
        content = ir.serde.serialize_function(function).SerializeToString(deterministic=True)
        if content not in self._by_content:
            count = self._names[name] = self._names.get(name, 0) + 1
            if count > 1:
                function.name = f"{name}_{count - 1}"
            self._by_content[content] = function
            self.functions.append(function)
        return self._by_content[content]


def forget_types(nodes: Sequence[ir.Node]) -> None:
    """Leave out dtypes and shapes of values inside, which served to build the nodes."""
    for node in _with_branches(nodes):
        for value in node.outputs:
            value.shape, value.type = None, None


def formal(name: str, value: Any) -> Any:
    """A function input for `value`: same dtype, same fixed dimensions. Anything but an ir.Value stays as it is."""
    if not isinstance(value, ir.Value):
        return value
    shape = None if value.shape is None else ir.Shape([d if isinstance(d, int) else None for d in value.shape])
    return ir.Value(name=name, shape=shape, type=value.type)


def _described(value: Any) -> Any:
    if isinstance(value, ir.Value):
        dims = () if value.shape is None else tuple(d if isinstance(d, int) else None for d in value.shape)
        return value.dtype, dims
    return tuple(value) if isinstance(value, list) else value


def _needed(nodes: Sequence[ir.Node], outputs: Sequence[ir.Value]) -> list[ir.Node]:
    read, needed = set(outputs), []
    for node in reversed(nodes):
        if read.intersection(node.outputs):
            needed.append(node)
            read.update(value for inner in _with_branches([node]) for value in inner.inputs if value is not None)
    return needed[::-1]


def _with_branches(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """`nodes` and those of their branches, of which each result is made by one of these."""
    for node in nodes:
        yield node
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                yield from _with_branches(list(attribute.as_graph()))
