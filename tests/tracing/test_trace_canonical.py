"""One spelling for one meaning in a traced graph."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import computes_the_same, traced
from test_trace_stamp import Reversed, Sized, SizedFromTwo, checkpoint_of
from tiny import meta_model, tiny_config
from torch import Tensor, fx, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.models import DecoderLayer
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.tracing import trace

ATEN = torch.ops.aten


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return Checkpoint(Path("tiny"), tiny_config(), {})


class AddsScaled(DecoderLayer):
    """alpha belongs to the second operand."""

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, *rest)
        return torch.add(y, x, alpha=2), present


class Weighed(DecoderLayer):
    """Parameters on the left of their operands, and of each other."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.a, self.b = (nn.Parameter(torch.empty(self.input_layernorm.weight.shape)) for _ in range(2))

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(self.b * x + (self.b + self.a), *rest)


def block(program: Program, target: object) -> list[list[str]]:
    """Operands of the calls of one operator in layer 0."""
    calls = [node for node in program.nodes(target) if node.meta["block"] == "model.layers.0"]
    return [[getattr(argument, "name", str(argument)) for argument in node.args] for node in calls]


def test_the_order_of_summands_does_not_show(checkpoint: Checkpoint) -> None:
    assert dump_program(traced(checkpoint, Reversed)) == dump_program(trace(meta_model(checkpoint), checkpoint))


def test_a_factor_of_one_summand_keeps_its_place(checkpoint: Checkpoint) -> None:
    program = traced(checkpoint, AddsScaled)
    assert block(program, ATEN.add.Tensor)[-1] == ["layers_0_add_1", "embed_tokens"]


def test_parameters_come_last(checkpoint: Checkpoint) -> None:
    program = traced(checkpoint, Weighed)
    assert block(program, ATEN.mul.Tensor) == [["embed_tokens", "layers_0_b"]]
    assert block(program, ATEN.add.Tensor)[:2] == [["layers_0_a", "layers_0_b"], ["layers_0_mul", "layers_0_add"]]


@pytest.mark.parametrize("layer", [Sized, SizedFromTwo])
def test_a_size_is_read_once_from_the_first_input_that_has_it(layer: type[DecoderLayer]) -> None:
    program = traced(checkpoint_of(), layer)
    sizes = [tuple(node.args) for node in program.nodes(ATEN.sym_size.int)]
    assert len(sizes) == len(set(sizes)) > 1
    inputs = [node for node in program.graph.graph.nodes if node.op == "placeholder"]
    allowed = {(inputs[0], 0), (inputs[0], 1), (inputs[1], 1), (inputs[3], 1)}
    assert set(sizes) <= allowed
    numbers = [str(node.meta["val"]) for node in _integers(program)]
    assert len(numbers) == len(set(numbers))


def _integers(program: Program) -> list[fx.Node]:
    return [node for node in program.graph.graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)]


@pytest.mark.parametrize("layer", [Reversed, Sized, AddsScaled])
def test_it_computes_the_same(layer: type[DecoderLayer], tiny: Callable[..., Checkpoint]) -> None:
    assert computes_the_same(tiny(), layer)
