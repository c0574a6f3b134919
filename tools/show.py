"""fxquant show"""

from pathlib import Path
from typing import Annotated

import typer

from fxquant.tools.compile_model import Model
from fxquant.tools.console import console


def command(
    model: Model,
    block: Annotated[
        str | None, typer.Option(help="Only this block, such as model.layers.3; before and after are the ends.")
    ] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Checkpoint for a model.py that names none.")] = None,
) -> None:
    """Print the graph of a model, or the rewritten graph of a compiled folder, with shapes and parameter names."""
    from fxquant.api import open_graph
    from fxquant.printing import format_program

    for line in format_program(open_graph(model, checkpoint), block):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
