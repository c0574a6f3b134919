"""Program builder: the fields of a graph file → a program, if all of them are valid.

Operators are looked up in the table of `fxquant.program.operators`, and called on meta tensors to infer the shapes of
their results. No code is generated from the graph, here or later.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, fx

from fxquant.checkpoint.config import parse_config
from fxquant.inputs.limits import BATCH_BYTES, NAME_LENGTH, SIZE, VALUE_BYTES
from fxquant.inputs.validation import validation_fact
from fxquant.policy.policy import Rule
from fxquant.program.arguments import decode, read_dtype
from fxquant.program.bounded_shapes import BoundedRules, most_alive
from fxquant.program.graph import ProgramGraph
from fxquant.program.operators import OPERATORS
from fxquant.program.program import MtpLayers, Parameter, Program
from fxquant.program.schema import SYMBOLS, Document, NodeFields, ParameterFields, RecipeFields
from fxquant.schemes.roles import module_and_role
from fxquant.schemes.schemes import ActivationRange, Recipe, why_not
from fxquant.storage.safetensors import DTYPES

SMALL = {"batch": 2, "sequence": 12, "past": 5, "total": 17}
"""A second set of sizes, at which values that do not grow with the input must be small."""
INPUTS: dict[str, list[Any]] = {
    "input_ids": ["batch", "sequence"],
    "attention_mask": ["batch", "total"],
    "position_ids": ["batch", "sequence"],
}


def build_program(document: Document, place: object) -> Program:
    """Raises ValueError, naming the node at fault, if the document is not a program.

    `place`: the place that an FxquantError about its config names.
    """
    parse_config(document.config, place)
    parameters = {target: _parameter(target, fields) for target, fields in document.parameters.items()}
    graph = _Builder(document).build()
    return Program(
        graph=graph,
        config=document.config,
        dtype=DTYPES[document.dtype],
        parameters=parameters,
        recipes={module: _recipe(module, fields) for module, fields in document.recipes.items()},
        rules={module: _rule(module, rule) for module, rule in document.rules.items()},
        names={node.name for node in graph.graph.nodes},
        mtp=MtpLayers(
            tuple(document.mtp.layers),
            {module: _recipe(module, fields) for module, fields in document.mtp.recipes.items()},
            document.mtp.float_tensors,
            tuple(document.mtp.gate_biases),
        ),
        stream=document.rotated_stream,
    )


class _Builder:
    """Creates the nodes in order, each from earlier ones, with its value at two sets of sizes."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.tensors = {target: _tensor(fields) for target, fields in document.parameters.items()}
        self.graph, self.nodes = fx.Graph(), {}  # type: fx.Graph, dict[str, fx.Node]
        largest = max((math.prod(fields.shape) for fields in document.parameters.values()), default=0)
        self.batch, self.small = BoundedRules(BATCH_BYTES), BoundedRules(max(VALUE_BYTES, 16 * largest))
        self.values: dict[fx.Node, Any] = {}
        self.caches: list[list[int]] = []

    def build(self) -> ProgramGraph:
        for number, entry in enumerate(self.document.nodes):
            try:
                self._add(entry, last=number == len(self.document.nodes) - 1)
            except Exception as error:  # whatever an operator's own check of its arguments raises
                raise ValueError(f"node {entry.name}: {_first_line(error)}") from None
        if not self.nodes or self.graph.output_node() is None:
            raise ValueError("it has no output")
        read = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        unread = next((target for target in self.tensors if target not in read), None)
        if unread is not None:
            raise ValueError(f"no node reads parameter {unread}")
        taken = most_alive(self.graph, self.values)
        if taken > self.small.limit:
            raise ValueError(f"its live values take {taken:,} bytes, the limit is {self.small.limit:,}")
        return ProgramGraph(self.graph, self.tensors)

    def _add(self, entry: NodeFields, last: bool) -> None:
        if entry.name in self.nodes:
            raise ValueError("two nodes have this name")
        if (entry.op == "output") != last:
            raise ValueError("the last node, and no other, must be the output")
        if entry.op != "placeholder" and (entry.dtype is not None or entry.shape is not None):
            raise ValueError("only an input has a dtype and a shape")
        make: dict[str, Callable[[NodeFields], fx.Node]] = {
            "placeholder": self._input, "get_attr": self._read, "call_function": self._call, "output": self._output,
        }  # fmt: skip
        node = make[entry.op](entry)
        node.name = entry.name
        node.meta |= {"module": entry.module, "kind": entry.kind, "block": entry.block}
        self.nodes[entry.name] = node

    def _node(self, entry: NodeFields, target: Any, args: tuple = (), kwargs: dict | None = None) -> fx.Node:
        return self.graph.create_node(entry.op, target, args, kwargs or {}, name=entry.name)

    def _input(self, entry: NodeFields) -> fx.Node:
        """input_ids, attention_mask, position_ids, then past_0, past_1, …"""
        position = len(self.graph.find_nodes(op="placeholder"))
        known = [*INPUTS]
        name = known[position] if position < len(known) else f"past_{position - len(known)}"
        width = [size for size in (entry.shape or [])[2:3] if type(size) is int and 0 < size < SIZE]
        shape = INPUTS.get(name) or ["batch", "past", *width]
        if entry.name != name or entry.target != name or entry.args or entry.kwargs is not None:
            raise ValueError(f"input {position} must be {name}")
        if entry.shape != shape:
            raise ValueError(f"shape {str(entry.shape)[:NAME_LENGTH]}, the shape of {name} is {shape}")
        dtype = read_dtype(entry.dtype)
        if dtype.is_floating_point == (name in INPUTS):
            raise ValueError(f"dtype {entry.dtype}")
        self.caches += [width] if name not in INPUTS else []
        node = self._node(entry, name)
        node.meta["val"], self.values[node] = (
            torch.empty([*(sizes[size] for size in shape[:2]), *width], dtype=dtype, device="meta")
            for sizes in (SYMBOLS, SMALL)
        )
        return node

    def _read(self, entry: NodeFields) -> fx.Node:
        if entry.target not in self.tensors or entry.args or entry.kwargs is not None:
            raise ValueError(f"the file has no parameter {entry.target!r}")
        node = self._node(entry, entry.target)
        node.meta["val"] = self.values[node] = self.tensors[entry.target]
        return node

    def _call(self, entry: NodeFields) -> fx.Node:
        target = OPERATORS.get(entry.target)
        if target is None:
            raise ValueError(f"operator {entry.target!r} is not allowed")
        args = tuple(decode(arg, self.nodes) for arg in entry.args)
        kwargs = decode(entry.kwargs, self.nodes, named=True) if entry.kwargs is not None else {}
        node = self._node(entry, target, args, kwargs)
        arguments = node.args, node.kwargs
        node.meta["val"] = self.batch.named(entry.target, *fx.map_arg(arguments, lambda operand: operand.meta["val"]))
        self.values[node] = self.small.named(entry.target, *fx.map_arg(arguments, self.values.__getitem__))
        return node

    def _output(self, entry: NodeFields) -> fx.Node:
        """Logits and, for each `past_i`, the grown latents."""
        results = [decode(arg, self.nodes) for arg in entry.args]
        if entry.target != "output" or entry.kwargs is not None or len(results) != 1 or type(results[0]) is not list:
            raise ValueError("its argument must be a list of nodes")
        if not all(isinstance(result, fx.Node) and isinstance(result.meta["val"], Tensor) for result in results[0]):
            raise ValueError("its argument must be a list of tensors")
        logits, *grown = (tuple(result.meta["val"].shape) for result in results[0])
        batch, sequence, total = (SYMBOLS[name] for name in ("batch", "sequence", "total"))
        if len(logits) != 3 or logits[:2] != (batch, sequence):
            raise ValueError("its first result is not [batch, sequence, vocabulary]")
        if grown != [(batch, total, *width) for width in self.caches]:
            raise ValueError("its other results are not [batch, total, width], one per cache")
        node = self._node(entry, "output", (results[0],))
        node.meta["val"] = None
        return node


def _tensor(fields: ParameterFields) -> Tensor:
    return torch.empty(fields.shape, dtype=DTYPES[fields.dtype], device="meta")


def _parameter(target: str, fields: ParameterFields) -> Parameter:
    experts = fields.shape[:1] if fields.stacked else [1]
    if experts != [len(fields.names)]:
        raise ValueError(f"parameter {target}: {len(fields.names)} names for shape {fields.shape}")
    module, role = module_and_role(target)
    if module != fields.module:
        raise ValueError(f"parameter {target}: its module is {fields.module}")
    return Parameter(tuple(fields.names), module, fields.kind, role, fields.stacked)


def _recipe(module: str, fields: RecipeFields) -> Recipe:
    observed = fields.activation
    if observed is not None and observed[0] > observed[1]:
        raise ValueError(f"recipe {module}: activation from {observed[0]} to {observed[1]}")
    activation = None if observed is None else ActivationRange(observed[0], observed[1], DTYPES[observed[2]])
    values = fields.model_dump(exclude={"activation", "modules", "dtype", "scale_dtype"})
    recipe = Recipe(
        module=module,
        modules=tuple(fields.modules),
        activation=activation,
        dtype=DTYPES[fields.dtype],
        scale_dtype=DTYPES[fields.scale_dtype],
        **values,
    )
    reason = why_not(recipe)
    if reason is not None:
        raise ValueError(f"recipe {module}: {reason}")
    return recipe


def _rule(module: str, fields: dict[str, Any]) -> Rule:
    """Raises ValueError for a rule that would be written differently than it was read."""
    try:
        rule = Rule.model_validate(fields)
    except ValidationError as error:
        raise ValueError(f"rule of {module}: {validation_fact(error, Rule, fields, 1).rstrip('.')}") from None
    if rule.model_dump(mode="json") != fields:
        raise ValueError(f"rule of {module}: not in the form that fxquant writes")
    return rule


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0][:500]
    return text if isinstance(error, ValueError | RuntimeError) and text else f"{type(error).__name__}: {text}"
