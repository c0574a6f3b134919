"""fxquant compile"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxquant.errors import FxquantError
from fxquant.tools.console import console, print_json, reporter, size

if TYPE_CHECKING:
    from fxquant.api import CompileReport

Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A model.py, or a Hugging Face checkpoint folder.", show_default=False)
]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy", "-p", help="Shipped policy or YAML file. [dim]default: the model file's, or deepseek_w4a8[/]"
    ),
]

OutFolder = Annotated[
    Path | None, typer.Option("-o", "--out", help="Output folder. [dim]default: ./<name>-<policy>-<target>[/]")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(help="Calibration .txt, .jsonl, or token ids. [dim]default: calibration.jsonl beside the model[/]"),
]
CheckpointFolder = Annotated[Path | None, typer.Option(help="Checkpoint for a model.py that names none.")]
TraceTimeout = Annotated[
    float, typer.Option(metavar="SECONDS", help="Longest a model.py may take to import, build and trace.", min=0.1)
]


def command(
    model: Model,
    policy: PolicyName = None,
    out: OutFolder = None,
    target: Annotated[str, typer.Option("--target", "-t", help="ascend or onnx.")] = "ascend",
    calib: CalibrationFile = None,
    calib_samples: Annotated[int, typer.Option(help="Batches to calibrate on.", min=1)] = 32,
    calib_length: Annotated[int, typer.Option(help="Tokens a batch of text.", min=2)] = 256,
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 4GiB or 500MB.")] = "4GiB",
    kv_cache: Annotated[str, typer.Option(help="float: the one choice, see --kv-cache int8.")] = "float",
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Read everything back and compare.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Quantize MODEL under a policy and write what an engine loads.

    Traces the model, calibrates static layers, rewrites the graph, writes weights and graph, and verifies them.
    """
    from fxquant.api import CompileOptions, compile

    options = CompileOptions(
        policy=policy,
        out=out,
        target=parse_target(target),
        calib=calib,
        calib_samples=calib_samples,
        calib_length=calib_length,
        checkpoint=checkpoint,
        trace_timeout=trace_timeout,
        max_shard_size=parse_size(max_shard_size),
        force=force,
        verify=verify,
        kv_cache=kv_cache,
    )
    report = compile(model, options, reporter(quiet or as_json))
    print_json(as_document(report)) if as_json else print_report(report)


def parse_target(name: str) -> "Target":  # type: ignore[name-defined]  # noqa: F821
    """The target of that name."""
    from fxquant.targets import Target

    if name not in list(Target):
        raise FxquantError(f"--target {name}", "unknown.", f"Choose one of: {', '.join(Target)}.")
    return Target(name)


def parse_size(text: str) -> int:
    """Bytes of "4GiB", "500MB" or "1000000"."""
    units = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
    number = text.rstrip("kKmMgGiIbB ")
    unit = text[len(number) :].strip().upper()
    try:
        value = int(float(number) * units[unit])
    except (ValueError, KeyError):
        value = 0
    if value <= 0:
        raise FxquantError(f"--max-shard-size {text}", "not a size.", "Write 4GiB, 500MB or a number of bytes.")
    return value


def as_document(report: "CompileReport") -> dict:
    """The report for scripts."""
    return {
        "out": str(report.out),
        "way_in": report.way_in,
        "structural_hash": report.structural_hash,
        "policy": report.policy.name,
        "target": report.target.value,
        "ledger": report.ledger.as_json()["totals"],
        "idle_rules": [str(rule) for rule in report.idle_rules],
        "files": {file.name: file.nbytes for file in report.output.files},
        "verification": report.verification.as_json() if report.verification else None,
    }


def print_report(report: "CompileReport", console: Console = console) -> None:
    """Ledger, optional rules that matched nothing, verification, and where it is."""
    from fxquant.tools.verify import verification_table

    table = Table(title="where every tensor of the checkpoint went", title_justify="left")
    for heading, justify in (("bucket", "left"), ("by", "left"), ("tensors", "right"), ("bytes", "right")):
        table.add_column(heading, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for (bucket, why), (count, nbytes) in sorted(report.ledger.totals().items()):
        table.add_row(bucket, why, f"{count:,}", size(nbytes))
    entries = report.ledger.entries
    table.add_section()
    table.add_row("checkpoint", "", f"{len(entries):,}", size(sum(entry.nbytes for entry in entries)))
    console.print(table)
    for rule in report.idle_rules:
        reason = "optional" if rule.optional else "overridden"
        console.print(f"[dim]rule “{rule}” decided nothing ({reason})[/]", highlight=False)
    if report.verification:
        console.print(verification_table(report.verification))
    written = sum(file.nbytes for file in report.output.files)
    console.print(f"[bold]{report.out}[/]  {size(written)} of weights, policy {report.policy.name}", highlight=False)
    console.print(f"[dim]from a {report.way_in}, graph {report.structural_hash[:12]}[/]", highlight=False)
    console.print(f"[dim]read by {report.target.readers}[/]", highlight=False)
