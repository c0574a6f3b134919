"""Deployment program: a copy of the stored program, as a target's graph is emitted from it."""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fxquant.passes.base import Pass, PassResult
from fxquant.program.program import Program
from fxquant.program.program_check import ProgramCheck
from fxquant.program.program_file import dump_program, parse_program


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


def deploy(program: Program, fusions: Callable[[Program], Sequence[Pass]]) -> Deployment:
    """Fuse a copy of `program`. The copy computes the same, bit for bit, and reads the same weight files."""
    copy = parse_program(dump_program(program), "the deployment graph")
    check = ProgramCheck()
    return Deployment(copy, tuple(_step(fusion, copy, check) for fusion in fusions(copy)))


def _step(fusion: Pass, program: Program, check: ProgramCheck) -> Step:
    before = count_calls(program)
    result = fusion.apply(program)
    check(program, fusion.name)
    return Step(result, before, count_calls(program))


def count_calls(program: Program) -> int:
    """Number of operators that the graph calls, without getitem."""
    nodes = program.graph.graph.nodes
    return sum(node.op == "call_function" and node.target is not operator.getitem for node in nodes)
