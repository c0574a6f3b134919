"""The program verifier: each way in which a pass can leave a program that does not hold together, by name."""

from collections.abc import Callable

import pytest
import torch
from rewrites import rewrite
from torch import fx

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import InternalError
from fxquant.lowering.ascend.deployment import deployment
from fxquant.passes import Pass, PassResult, run_passes
from fxquant.program.program import Program
from fxquant.program.program_check import ProgramCheck
from fxquant.program.program_file import dump_program, parse_program

EXPERTS = "model.layers.1.mlp.experts"
ATTENTION = "model.layers.0.self_attn"
Change = Callable[[Program], object]


@pytest.fixture(scope="module")
def text(tiny: Callable[..., Checkpoint]) -> str:
    """A quantized program with static, dynamic and grouped products."""
    return dump_program(rewrite(tiny(), "deepseek_w4a8").program)


@pytest.fixture
def program(text: str) -> Program:
    return parse_program(text, "the program")


def read(program: Program, target: str) -> fx.Node:
    (node,) = program.graph.graph.find_nodes(op="get_attr", target=target)
    return node


def first(program: Program, operator: object) -> fx.Node:
    return program.nodes(operator)[0]


def wrong_value(program: Program) -> None:
    first(program, ops.int_matmul).meta["val"] = torch.empty(3, 5, dtype=torch.float64, device="meta")


def no_value(program: Program) -> None:
    del first(program, ops.swiglu).meta["val"]


def one_value_of_two(program: Program) -> None:
    node = first(program, ops.quantize_per_token)
    node.meta["val"] = node.meta["val"][:1]


def wrong_dtype_of_a_parameter(program: Program) -> None:
    target = f"{ATTENTION}.o_proj.deq_scale"
    read(program, target).meta["val"] = program.graph.tensors[target].double()


def exchange(program: Program, late: str, early: str) -> None:
    """What reads parameter `late` reads `early` instead, which has the same shape."""
    read(program, late).replace_all_uses_with(read(program, early))


def foreign_deq_scale(program: Program) -> None:
    exchange(program, "model.layers.1.self_attn.o_proj.deq_scale", f"{ATTENTION}.o_proj.deq_scale")


def foreign_scale_of_experts(program: Program) -> None:
    exchange(program, f"{EXPERTS}.up_proj.weight_scale", f"{EXPERTS}.gate_proj.weight_scale")


def foreign_second_scale(program: Program) -> None:
    exchange(program, f"{EXPERTS}.up_proj.weight_scale_second", f"{EXPERTS}.gate_proj.weight_scale_second")


def foreign_range(program: Program) -> None:
    """The integers of another linear with as many features."""
    here, there = (read(program, f"model.layers.{layer}.self_attn.o_proj.input_scale").users for layer in (0, 1))
    next(iter(there)).replace_all_uses_with(next(iter(here)))


def wrong_operand(program: Program) -> None:
    node = first(program, ops.int_matmul)
    node.args = (node.args[0], read(program, "model.norm.weight"))


def no_parameter(program: Program) -> None:
    del program.parameters["model.norm.weight"]


def used_before_it_is_made(program: Program) -> None:
    node = first(program, ops.swiglu)
    list(program.graph.graph.find_nodes(op="placeholder"))[-1].append(node)


CHANGES: dict[str, tuple[Change, str]] = {
    "a value of another dtype and shape": (wrong_value, r"its value is float64\[3, 5\], expected int32"),
    "no value": (no_value, "has no checked shape"),
    "one value of two": (one_value_of_two, "gives 2 values"),
    "a parameter of another dtype": (wrong_dtype_of_a_parameter, "its value is float64.*, expected float32"),
    "deq_scale of another linear": (foreign_deq_scale, r"scales sums of .*layers\.1\.self_attn\.o_proj by tensors of"),
    "a weight_scale of another projection": (foreign_scale_of_experts, "scales sums of .*up_proj by tensors of"),
    "second scales of another projection": (foreign_second_scale, "multiplies by tensors of .*gate_proj and .*up_proj"),
    "integers of another range": (
        foreign_range,
        r"multiplies integers quantized with the range of .*layers\.0\S* by the weight of",
    ),
    "an operand of another kind": (wrong_operand, "its operator refuses its arguments"),
    "a parameter that is not there": (no_parameter, r"reads model\.norm\.weight, which is not a parameter"),
    "a value used before it is made": (used_before_it_is_made, "was used before it has been defined"),
}


def test_a_right_program_holds(program: Program) -> None:
    ProgramCheck()(program, "nothing")
    assert len(deployment(program).steps) == 3


class Spoil(Pass):
    """A pass that does `change`."""

    name = "spoil"

    def __init__(self, change: Change) -> None:
        self.change = change

    def apply(self, program: Program) -> PassResult:
        self.change(program)
        return PassResult(self.name)


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=CHANGES.keys())
def test_what_a_pass_spoils_is_found_after_it(program: Program, change: Change, reason: str) -> None:
    """Also where the program was right before, and most of it is not looked at again."""
    with pytest.raises(InternalError, match=f"(?s)after spoil: .*{reason}"):
        run_passes(program, [Spoil(lambda program: None), Spoil(change)])
