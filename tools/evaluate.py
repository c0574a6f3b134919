"""fxquant eval"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fxquant.tools.console import console, print_json, reporter


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    text: Annotated[Path, typer.Option(help="Text to score: .txt, .json, .jsonl or token ids.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="The float model. [dim]default: the path in the manifest[/]")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Pieces of text to score. [dim]default: 64, or 16 for --sensitivity[/]", min=1)
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Most tokens of a piece.", min=2)] = 256,
    engine: Annotated[
        bool, typer.Option("--engine", help="Also as the engine computes it, exactly and with device rounding.")
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Instead, what each quantized module costs alone.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="With --sensitivity, a picture too: .png or .svg.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Perplexity of the float model and of OUT's integer graph, and the KL divergence a token between them."""
    from fxquant.api import engine_perplexities, evaluate
    from fxquant.tools.figures import FIGURES, figures, intervals
    from fxquant.tools.sensitivity import check_plot, show_sensitivity

    report = reporter(quiet or as_json)
    check_plot(plot, sensitivity, engine)
    if sensitivity:
        show_sensitivity(out, text, against, samples or 16, seq_len, report, plot, as_json)
        return
    samples = samples or 64
    result = evaluate(out, text, against, samples, seq_len, report)
    engines = engine_perplexities(out, text, samples, seq_len, report) if engine else {}
    if as_json:
        print_json(result.as_json() | ({"engine": engines} if engine else {}))
        return
    table = Table(
        title=f"{result.tokens:,} tokens in {result.documents} documents of {text.name}", title_justify="left"
    )
    for heading in ("", *(figure.heading for figure in FIGURES.values())):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("float", f"{result.float_perplexity:.4f}")
    table.add_row("quantized", *figures(result))
    if result.intervals:
        table.add_row("95 %", *intervals(result), style="dim")
    for name, perplexity in engines.items():
        table.add_row(name, f"{perplexity:.4f}")
    console.print(table)
