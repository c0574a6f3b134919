"""fxquant run"""

from pathlib import Path
from typing import Annotated

import typer

from fxquant.tools.console import console


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Stop after this many tokens.", min=1)] = 64,
) -> None:
    """Continue a prompt greedily: by ONNX Runtime where OUT has an ONNX graph, else by its fx graph on CPU."""
    from fxquant.api import run

    pieces = run(out, prompt, max_new_tokens)  # checks folder and prompt before anything is printed
    console.print(prompt, end="", soft_wrap=True)
    for piece in pieces:
        console.print(piece, end="", soft_wrap=True)
    console.print()
