"""Ascend deployment: a copy of the stored program, fused to the operators of NPU engines, for the Ascend emitter."""

from fxquant.lowering.ascend.emitter.values import float32_values
from fxquant.lowering.deployment import Deployment, deploy
from fxquant.passes.pipeline import npu_fusions
from fxquant.program.program import Program

WIDEST_SWIGLU = 4096
"""Maximum features of one npu_dequant_swiglu_quant.

The kernel's rows must fit on chip (ops-nn, aclnnDequantSwigluQuant): ten times the 2 · features inputs of two bytes,
plus a fortieth of the scales of all rows, must be less than 192 KiB. 4096 features take 160 KiB and leave room for the
scales of 300,000 rows.
"""


def deployment(program: Program) -> Deployment:
    """The program that NPUs run."""
    return deploy(program, lambda copy: npu_fusions(frozenset(float32_values(copy)), WIDEST_SWIGLU))
