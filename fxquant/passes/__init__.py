"""Graph → graph, one pass a file. `pipeline` is the one list, in order."""

from collections.abc import Sequence

from fxquant.passes.assign_mtp import AssignMtp
from fxquant.passes.assign_schemes import AssignSchemes
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.calibrate import Calibrate
from fxquant.passes.check_contract import CheckContract
from fxquant.passes.check_coverage import CheckCoverage
from fxquant.passes.find_rotation import FindRotation
from fxquant.passes.npu.fuse_norm_quantize import FuseNormQuantize
from fxquant.passes.npu.fuse_swiglu_quantize import FuseSwigluQuantize
from fxquant.passes.npu.share_quantize import ShareQuantize
from fxquant.passes.pair_smoothing import PairSmoothing
from fxquant.passes.quantize_experts import QuantizeExperts
from fxquant.passes.quantize_linear import QuantizeLinear
from fxquant.program.program import Program

__all__ = [
    "AssignMtp",
    "AssignSchemes",
    "Calibrate",
    "CheckContract",
    "CheckCoverage",
    "FindRotation",
    "FuseNormQuantize",
    "FuseSwigluQuantize",
    "PairSmoothing",
    "Pass",
    "PassResult",
    "QuantizeExperts",
    "QuantizeLinear",
    "ShareQuantize",
    "pipeline",
    "run_passes",
]


def pipeline(assign: Sequence[Pass], calibrate: Pass, contract: Sequence[Pass] = ()) -> list[Pass]:
    """Every pass, in order; those that need more than the graph come ready made.

    The contract is checked twice: before weights are read, and when static linears have their ranges.
    """
    return [*assign, *contract, calibrate, *contract, QuantizeLinear(), QuantizeExperts(), CheckCoverage()]


def run_passes(program: Program, passes: Sequence[Pass]) -> list[PassResult]:
    """Apply `passes` in order."""
    return [one(program) for one in passes]
