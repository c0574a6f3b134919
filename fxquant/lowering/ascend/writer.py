"""Ascend writer: `model_ascend.py` beside the weight files of an output folder."""

from pathlib import Path

from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.emitter.emit import ascend_code
from fxquant.lowering.deployment import Deployment
from fxquant.program.program import Program

FILE = "model_ascend.py"


def write_ascend(program: Program, folder: Path) -> Deployment:
    """Write `model_ascend.py` into `folder`, whose weight files its `Model.load(folder)` reads; return its program.

    Raises FxquantError if an operator or a shape has no counterpart on the engine.
    """
    deployed = deployment(program)
    (folder / FILE).write_text(ascend_code(deployed.program), encoding="utf-8", newline="\n")
    return deployed
