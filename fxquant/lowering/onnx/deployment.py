"""ONNX deployment: a copy of the stored program with the operators that `model.onnx` has functions for."""

from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.deployment import Deployment, deploy
from fxquant.passes.pipeline import onnx_fusions
from fxquant.program.program import Program


def deployment(program: Program, form: OnnxForm) -> Deployment:
    """The program that the ONNX writer emits for a form."""
    blocks = form.accuracy_level.value if form.profile.contrib else None
    joined = form.profile is not OnnxProfile.INTEGER
    return deploy(program, lambda _: onnx_fusions(join_linears=joined, cache=form.cache, blocks=blocks))
