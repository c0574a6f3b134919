"""ONNX deployment: a copy of the stored program with the operators that `model.onnx` has functions for."""

from fxquant.lowering.deployment import Deployment, deploy
from fxquant.passes.pipeline import onnx_fusions
from fxquant.program.program import Program


def deployment(program: Program) -> Deployment:
    """The program that the ONNX writer emits."""
    return deploy(program, lambda _: onnx_fusions())
