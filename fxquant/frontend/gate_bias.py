"""Gate biases: what a checkpoint must have for a published gate that masks groups with 0 to choose as DeepSeek's does.

    masked with 0:    an expert of another group is chosen where fewer than top_k of the chosen groups have
                      sigmoid(logit) + bias > 0
    masked with -inf: never

No score is below 0, so both are one function where no bias is. Which it is only the weights tell.
"""

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.frontend.recognition.published import Version
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program

ROLE = "e_score_correction_bias"


def check_biases(program: Program, checkpoint: Checkpoint, version: Version | None) -> None:
    """Raise FxquantError for a negative correction bias in `checkpoint` if the model has a gate of such a `version`.

    A checkpoint without tensors, of which only sizes are asked, is not looked at.
    """
    if version is None:
        return
    for parameter in program.parameters.values():
        name = parameter.names[0]
        if parameter.kind != Kind.GATE or parameter.role != ROLE or name not in checkpoint.tensors:
            continue
        least = checkpoint.read(name).min().item()
        if least < 0:
            fact = f"its least correction bias is {least:.3g}; the {version.name} of {version.source} masks the groups "
            fact += "that it does not choose with 0, and would choose their experts before those of negative score."
            way_out = "DeepSeek's code and transformers 5.6 or later mask with -inf: take one of them, or the folder."
            raise FxquantError(f"{checkpoint.folder}: {name}", fact, way_out)
