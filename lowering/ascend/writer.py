"""The Ascend graph of an output folder: `model_ascend.py` beside the weight files."""

from pathlib import Path

from fxquant.lowering.ascend.emit import ascend_source
from fxquant.program import Program

FILE = "model_ascend.py"


def write_ascend(program: Program, folder: Path) -> Path:
    """Write `model_ascend.py` into `folder`, whose weight files its `Model.load(folder)` reads; return its path.

    Raises FxquantError where an operator or a shape has no counterpart on the engine.
    """
    path = folder / FILE
    path.write_text(ascend_source(program), encoding="utf-8", newline="\n")
    return path
