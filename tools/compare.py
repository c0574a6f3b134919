"""fxquant compare"""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fxquant.tools.compile_options import CheckpointFolder, Device, Model, TraceTimeout
from fxquant.tools.console import console, print_json, reporter, size


def command(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to score: .txt, .json, .jsonl or token ids.", show_default=False)],
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policies to compare. [dim]default: all shipped ones[/]")
    ] = None,
    calib: Annotated[Path | None, typer.Option(help="Calibration text, as for compile.")] = None,
    device: Device = "cpu",
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    samples: Annotated[int, typer.Option(help="Pieces of text to score.", min=1)] = 64,
    seq_len: Annotated[int, typer.Option(help="Most tokens of a piece.", min=2)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Perplexity, KL and size of MODEL under each policy, without writing anything."""
    from fxquant.api import CompileOptions, compare
    from fxquant.policy import shipped_policies
    from fxquant.tools.figures import interval

    options = CompileOptions(calib=calib, checkpoint=checkpoint, trace_timeout=trace_timeout, device=device)
    names = policy or shipped_policies()
    results = compare(model, names, text, options, samples, seq_len, reporter(quiet or as_json))
    if as_json:
        print_json({name: result.as_json() | {"bytes": nbytes} for name, (result, nbytes) in results.items()})
        return
    tokens = next(iter(results.values()))[0].tokens
    table = Table(title=f"{model} on {tokens:,} tokens of {text.name}", title_justify="left")
    for heading in ("policy", "weights", "float ppl", "quantized ppl", "KL a token", "95 % of it", "top-1 agreement"):
        table.add_column(heading, justify="left" if heading == "policy" else "right")
    for name, (result, nbytes) in results.items():
        perplexities = (f"{result.float_perplexity:.4f}", f"{result.quantized_perplexity:.4f}")
        divergence = (f"{result.kl_mean:.5f}", interval(result, "kl_mean"))
        table.add_row(name, size(nbytes), *perplexities, *divergence, f"{result.top1_agreement:.2%}")
    console.print(table)
