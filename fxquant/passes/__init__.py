"""Passes: graph → graph, one pass per file. `pipeline.py` lists them in order."""

from fxquant.passes.assign_mtp import AssignMtp
from fxquant.passes.assign_schemes import AssignSchemes
from fxquant.passes.base import Pass, PassResult, RewritePass, choices, findings, run_passes
from fxquant.passes.calibrate import Calibrate
from fxquant.passes.check_contract import CheckContract
from fxquant.passes.check_coverage import CheckCoverage
from fxquant.passes.find_rotation import FindRotation
from fxquant.passes.npu.fuse_norm_quantize import FuseNormQuantize
from fxquant.passes.npu.fuse_swiglu_quantize import FuseSwigluQuantize
from fxquant.passes.npu.share_quantize import ShareQuantize
from fxquant.passes.pair_smoothing import PairSmoothing
from fxquant.passes.pipeline import pipeline
from fxquant.passes.quantize_experts import QuantizeExperts
from fxquant.passes.quantize_linear import QuantizeLinear

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
    "RewritePass",
    "ShareQuantize",
    "choices",
    "findings",
    "pipeline",
    "run_passes",
]
