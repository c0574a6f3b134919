"""fxquant compare"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxquant.engines.table import DEFAULT
from fxquant.tools.compile_options import CheckpointFolder, Device, Model, TraceTimeout, parse_target
from fxquant.tools.completion import policies, targets
from fxquant.tools.console import console, print_json, size
from fxquant.tools.stages import reporter
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.evaluation.verbs import Compared

HEADINGS = ("policy", "weights", "float ppl", "quantized ppl", "KL per token", "95 % interval", "top-1 agreement")
DIFFERENCES = ("policy", "difference", "95 % interval", "verdict")

OUTLIERS = "they neither smooth nor rotate; see docs/accuracy.md for what that costs on a model that has some."


def command(
    model: Model,
    text: Annotated[
        Path, typer.Option(metavar="FILE", help="Text to score: .txt, .json, .jsonl or token ids.", show_default=False)
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="POLICY",
            help="Policies to compare. [dim]default: all shipped policies[/]",
            autocompletion=policies,
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="TARGET",
            help=f"Targets to compare them for: see fxquant targets. [dim]default: {DEFAULT.value}[/]",
            autocompletion=targets,
        ),
    ] = None,
    calib: Annotated[Path | None, typer.Option(metavar="FILE", help="Calibration text, as for compile.")] = None,
    device: Device = "cpu",
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    samples: Annotated[int, typer.Option(metavar="N", help="Number of pieces of text to score.", min=1)] = 64,
    seq_len: Annotated[int, typer.Option(metavar="N", help="Maximum tokens per piece of text.", min=2)] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")] = False,
) -> None:
    """Compare perplexity, KL divergence and size of MODEL under each policy; nothing is written."""
    from fxquant.api import CompileOptions, compare
    from fxquant.policy.policy import load_policy, shipped_policies

    asked = list(dict.fromkeys(parse_target(given) for given in target or [DEFAULT.value]))
    options = CompileOptions(
        target=asked[0], calib=calib, checkpoint=checkpoint, trace_timeout=trace_timeout, device=device
    )
    names = policy or shipped_policies()
    results = compare(model, names, text, options, samples, seq_len, reporter(quiet or as_json), asked)
    if as_json:
        print_json({name: _as_json(compared) for name, compared in results.items()})
        return
    console.print(comparison_table(str(model), text.name, results))
    if len(results) > 1:
        console.print(difference_table(results))
    for line in dict.fromkeys(line for compared in results.values() for line in compared.choices):
        console.print(line, style="dim", soft_wrap=True)
    unguarded = [name for name in names if load_policy(name).unguarded]
    if unguarded:
        console.print(f"Nothing against outliers in {', '.join(unguarded)}: {OUTLIERS}")


def _as_json(compared: "Compared") -> dict[str, Any]:
    return compared.evaluation.as_json() | {"bytes": compared.nbytes, "choices": compared.choices}


def comparison_table(model: str, text: str, results: "dict[str, Compared]") -> NamedTable:
    """One row per policy."""
    from fxquant.tools.figures import interval

    tokens = next(iter(results.values())).evaluation.tokens
    table = NamedTable(f"{model} on {tokens:,} tokens of {text}", HEADINGS)
    for name, (result, nbytes, _) in results.items():
        perplexities = (f"{result.float_perplexity:.4f}", f"{result.quantized_perplexity:.4f}")
        divergence = (f"{result.kl_mean:.5f}", interval(result, "kl_mean"))
        table.add_row(name, size(nbytes), *perplexities, *divergence, f"{result.top1_agreement:.2%}")
    return table


def difference_table(results: "dict[str, Compared]") -> NamedTable:
    """KL per token of each row less that of the first."""
    from fxquant.tools.figures import difference

    first, *others = results
    table = NamedTable(f"KL per token less that of {first}, on the same tokens", DIFFERENCES, left={"verdict"})
    for name in others:
        table.add_row(name, *difference(results[name].evaluation))
    return table
