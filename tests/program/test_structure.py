"""The structural hash of a graph: what it counts and what it does not."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import float_program, tiny_config
from torch import fx

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.program.structural_hash import structural_hash

Change = Callable[[Program], None]
NORM = "model.norm.weight"


def fresh() -> Program:
    return float_program(Checkpoint(Path("tiny"), tiny_config(), {}))


def first(program: Program, target: object) -> fx.Node:
    return program.nodes(target)[0]


def other_names(program: Program) -> None:
    for index, node in enumerate(program.graph.graph.nodes):
        if node.op != "placeholder":
            node.name = f"node_{index}"


def reversed_parameters(program: Program) -> None:
    nodes = list(program.graph.graph.find_nodes(op="get_attr"))
    for node in nodes:
        next(iter(program.graph.graph.nodes)).prepend(node)
    assert [node for node in program.graph.graph.nodes if node in nodes] == nodes[::-1]


@pytest.mark.parametrize("change", [other_names, reversed_parameters])
def test_names_and_the_order_of_parameters_do_not_count(change: Change) -> None:
    program = fresh()
    change(program)
    assert structural_hash(program) == structural_hash(fresh())


def operator(program: Program) -> None:
    first(program, torch.ops.aten.add.Tensor).target = torch.ops.aten.mul.Tensor


def number(program: Program) -> None:
    node = first(program, ops.rms_norm)
    node.args = (*node.args[:2], 1e-5)


def operands(program: Program) -> None:
    node = first(program, ops.swiglu)
    node.args = node.args[::-1]


def another_source(program: Program) -> None:
    linears = program.nodes(ops.linear)
    linears[1].args = (linears[1].args[0], linears[0].args[1])


def keyword(program: Program) -> None:
    first(program, torch.ops.aten.add.Tensor).kwargs = {"alpha": 2}


def module(program: Program) -> None:
    first(program, ops.linear).meta["module"] = "model"


def kind(program: Program) -> None:
    first(program, ops.linear).meta["kind"] = Kind.OTHER


def block(program: Program) -> None:
    first(program, ops.linear).meta["block"] = "before"


def parameter_name(program: Program) -> None:
    program.parameters[NORM] = replace(program.parameters[NORM], names=("model.other.weight",))


def parameter_shape(program: Program) -> None:
    program.graph.tensors[NORM] = torch.empty(7, device="meta")


def output(program: Program) -> None:
    node = program.graph.graph.output_node()
    node.args = (node.args[0][:-1],)


@pytest.mark.parametrize(
    "change",
    [
        operator, number, operands, another_source, keyword, module, kind, block, parameter_name, parameter_shape,
        output,
    ],
)  # fmt: skip
def test_what_is_computed_counts(change: Change) -> None:
    program = fresh()
    change(program)
    assert structural_hash(program) != structural_hash(fresh())
