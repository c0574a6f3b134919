"""Graph → graph, one pass a file. `pipeline` is the one list, in order."""

from collections.abc import Sequence

from fxquant.passes.assign_schemes import AssignSchemes
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.calibrate import Calibrate
from fxquant.passes.check_coverage import CheckCoverage
from fxquant.passes.quantize_experts import QuantizeExperts
from fxquant.passes.quantize_linear import QuantizeLinear
from fxquant.program import Program

__all__ = [
    "AssignSchemes",
    "Calibrate",
    "CheckCoverage",
    "Pass",
    "PassResult",
    "QuantizeExperts",
    "QuantizeLinear",
    "pipeline",
    "run_passes",
]


def pipeline(assign: AssignSchemes, calibrate: Calibrate) -> list[Pass]:
    """Every pass, in order; the two that need more than the graph come ready made."""
    return [assign, calibrate, QuantizeLinear(), QuantizeExperts(), CheckCoverage()]


def run_passes(program: Program, passes: Sequence[Pass]) -> list[PassResult]:
    """Apply `passes` in order."""
    results = [one.apply(program) for one in passes]
    program.graph.recompile()
    return results
