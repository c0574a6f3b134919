"""Deployment program: a copy of the stored program, fused to the operators of NPU engines, for the Ascend emitter."""

import operator
from dataclasses import dataclass

from fxquant.lowering.ascend.emitter.values import float32_values
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.pipeline import npu_fusions
from fxquant.program.program import Program
from fxquant.program.program_check import ProgramCheck
from fxquant.program.program_file import dump_program, parse_program

WIDEST_SWIGLU = 4096
"""Maximum features of one npu_dequant_swiglu_quant.

The kernel's rows must fit on chip (ops-nn, aclnnDequantSwigluQuant): ten times the 2 · features inputs of two bytes,
plus a fortieth of the scales of all rows, must be less than 192 KiB. 4096 features take 160 KiB and leave room for the
scales of 300,000 rows.
"""


@dataclass(frozen=True)
class Step:
    """Result of one pass, and the number of operators that the graph called before and after it."""

    result: PassResult
    calls_before: int
    calls_after: int


@dataclass(frozen=True)
class Deployment:
    """A fused copy of a program, and the steps that fused it."""

    program: Program
    steps: tuple[Step, ...]


def deployment(program: Program) -> Deployment:
    """Fuse a copy of `program`. The copy computes the same, bit for bit, and reads the same weight files."""
    copy = parse_program(dump_program(program), "the deployment graph")
    check = ProgramCheck()
    steps = tuple(_step(fusion, copy, check) for fusion in npu_fusions(frozenset(float32_values(copy)), WIDEST_SWIGLU))
    return Deployment(copy, steps)


def _step(fusion: Pass, program: Program, check: ProgramCheck) -> Step:
    before = count_calls(program)
    result = fusion.apply(program)
    check(program, fusion.name)
    return Step(result, before, count_calls(program))


def count_calls(program: Program) -> int:
    """Number of operators that the graph calls, without getitem."""
    nodes = program.graph.graph.nodes
    return sum(node.op == "call_function" and node.target is not operator.getitem for node in nodes)
