"""Operands by name: as the schema names them, wherever a call has them."""

import operator

import pytest
import torch
from torch import fx

from fxquant import ops
from fxquant.errors import InternalError
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
    with pytest.raises(InternalError, match="^mul: .* is no torch operator"):
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
