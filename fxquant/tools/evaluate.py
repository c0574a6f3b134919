"""fxquant eval"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.tools.console import console, print_json
from fxquant.tools.stages import reporter
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.evaluation.divergence import Evaluation


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text to score: .txt, .json, .jsonl or token ids.", show_default=False)
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="MODEL", help="The float model. [dim]default: the path in the manifest[/]")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Number of pieces of text to score. [dim]default: 64, or 16 for --sensitivity[/]", min=1
        ),
    ] = None,
    seq_len: Annotated[int, typer.Option(metavar="N", help="Maximum tokens per piece of text.", min=2)] = 256,
    engine: Annotated[
        bool,
        typer.Option(
            "--as-engine", help="Also score with the engine's own arithmetic, exact and with device rounding."
        ),
    ] = False,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Report the cost of each quantized module alone instead.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="With --sensitivity: also write a picture (.png or .svg).", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")] = False,
) -> None:
    """Measure perplexity of the float model and of OUT's integer graph, and their KL divergence per token."""
    from fxquant.api import engine_perplexities, evaluate
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
    console.print(evaluation_table(text.name, result, engines))


def evaluation_table(text: str, result: "Evaluation", engines: dict[str, float]) -> NamedTable:
    """Rows for float, quantized, its intervals, and the engine's arithmetic."""
    from fxquant.tools.figures import FIGURES, figures, intervals

    title = f"{result.tokens:,} tokens in {result.documents} documents of {text}"
    table = NamedTable(title, ("", *(figure.heading for figure in FIGURES.values())))
    table.add_row("float", f"{result.float_perplexity:.4f}")
    table.add_row("quantized", *figures(result))
    if result.intervals:
        table.add_row("95 %", *intervals(result), style="dim")
    for name, perplexity in engines.items():
        table.add_row(name, f"{perplexity:.4f}")
    return table
