"""Operands by name: as the schema names them, wherever a call has them."""

import ast
import inspect
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

import fxquant
from fxquant import ops
from fxquant.errors import InternalError
from fxquant.lowering.ascend.emitter.statements import EMITTERS
from fxquant.program.operands import arguments, item_of, operand, operand_node, producer, set_operand

ADD = torch.ops.aten.add.Tensor


@pytest.fixture
def graph() -> fx.Graph:
    return fx.Graph()


def test_arguments_are_all_of_the_schema_in_its_order(graph: fx.Graph):
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    norm = graph.call_function(ops.rms_norm, (x, weight, 1e-6))
    assert list(arguments(norm).items()) == [("x", x), ("weight", weight), ("eps", 1e-6), ("bias", None)]
    assert arguments(graph.call_function(ADD, (x, weight)))["alpha"] == 1


@pytest.mark.parametrize("by_keyword", [0, 1, 2, 3])
def test_keywords_are_operands_as_positions_are(graph: fx.Graph, by_keyword: int):
    given = {name: graph.placeholder(name) for name in ("x", "weight", "bias")}
    places = tuple(given.values())[: 3 - by_keyword]
    keywords = dict(tuple(given.items())[3 - by_keyword :])
    linear = graph.call_function(ops.linear, places, keywords)
    assert arguments(linear) == given
    assert all(operand(linear, name) is operand_node(linear, name) is node for name, node in given.items())


def test_what_is_no_operand_is_an_internal_error(graph: fx.Graph):
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    linear = graph.call_function(ops.linear, (x, weight))
    with pytest.raises(InternalError, match=r"^linear_default: .* has no argument scale; it has x, weight, bias\.$"):
        operand(linear, "scale")
    with pytest.raises(InternalError, match=r"^linear_default: .* argument bias is None, not a node\.$"):
        operand_node(linear, "bias")
    with pytest.raises(InternalError, match="^mul: .* is not a torch operator"):
        arguments(graph.call_function(operator.mul, (x, 2)))


@pytest.mark.parametrize("keywords", [{}, {"bias": None}])
def test_an_operand_is_set_where_the_call_has_it(graph: fx.Graph, keywords: dict):
    x, weight, bias = (graph.placeholder(name) for name in ("x", "weight", "bias"))
    norm = graph.call_function(ops.rms_norm, (x, weight, 1e-6), keywords)
    set_operand(norm, "bias", bias)
    set_operand(norm, "x", weight)
    assert arguments(norm) == {"x": weight, "weight": weight, "eps": 1e-6, "bias": bias}
    assert set(norm.kwargs) == set(keywords) and bias.users == {norm: None} and not x.users


def test_arguments_before_one_that_is_set_get_their_defaults(graph: fx.Graph):
    x = graph.placeholder("x")
    part = graph.call_function(torch.ops.aten.slice.Tensor, (x,))
    set_operand(part, "end", 3)
    assert part.args == (x, 0, None, 3)


def test_an_item_is_of_the_call_that_makes_it(graph: fx.Graph):
    x = graph.placeholder("x")
    both = graph.call_function(ops.quantize_per_token, (x,))
    scale = graph.call_function(operator.getitem, (both, 1))
    assert item_of(scale) == (both, 1) and producer(scale) == (ops.quantize_per_token, 1)
    assert item_of(both) == (both, None) and producer(both) == (ops.quantize_per_token, None)


# the source


SOURCE = Path(fxquant.__file__).parent
READ_BY_POSITION = {
    "program/operands.py": "the place where names become positions",
    "program/graph.py": "an output node, which has one tuple",
    "tracing/stamp.py": "the output node of a graph that is no program yet",
    "program/bounded_shapes.py": "values: of a call that takes apart its first argument",
    "program/operators.py": "values: of Python's own operators, which have no names",
    "frontend/bridges.py": "what a user's forward is called with",
    "frontend/own/rotary_pairs.py": "what a function of torch is called with",
    "frontend/own/expert_loop.py": "a call in a syntax tree",
    "calibration/calibration_file.py": "an exception's",
    "evaluation/lm_eval.py": "a request of the harness",
}
"""Files that read `args` by a constant position → what they read."""


def by_position(tree: ast.AST) -> Iterator[ast.AST]:
    """`….args[1]`, `….args[:3]`, and `a, b, *c = ….args`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and is_args(node.value) and not names_in(node.slice):
            yield node
        if isinstance(node, ast.Assign) and is_args(node.value) and isinstance(node.targets[0], ast.Tuple):
            yield node


def is_args(node: ast.AST) -> bool:
    return getattr(node, "attr", getattr(node, "id", "")) == "args"


def names_in(node: ast.AST) -> bool:
    """Whether an index is computed, or a key."""
    return any(
        isinstance(inner, ast.Name) or isinstance(getattr(inner, "value", None), str) for inner in ast.walk(node)
    )


def test_no_source_reads_operands_by_position():
    files = {path.relative_to(SOURCE).as_posix(): path for path in SOURCE.rglob("*.py")}
    readers_by_position = {name for name, path in files.items() if any(by_position(ast.parse(path.read_text())))}
    assert readers_by_position == set(READ_BY_POSITION)


@pytest.mark.parametrize("text", ["n.args[0]", "n.args[-1]", "n.args[1:3]", "n.args[4:]", "a, *b = n.args", "args[0]"])
def test_what_counts_as_a_position(text: str):
    assert any(by_position(ast.parse(text)))


@pytest.mark.parametrize("text", ["n.args[i]", "args['key']", "all = n.args", "for one in n.args: pass"])
def test_what_does_not(text: str):
    assert not any(by_position(ast.parse(text)))


@pytest.mark.parametrize("target", EMITTERS, ids=str)
def test_statements_take_the_operands_of_their_operator(target: Any):
    """By name, all of them; those with `**given` ask for the rest themselves."""
    parameters = inspect.signature(EMITTERS[target]).parameters.values()
    named = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
    names = ["writer", "node", *(argument.name for argument in target._schema.arguments)]
    assert set(named) <= set(names)
    assert named == names or len(named) < len(tuple(parameters))
