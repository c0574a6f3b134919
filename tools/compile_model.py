"""fxquant compile"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxquant.tools.compile_options import (
    Address,
    AsJson,
    CalibrationFile,
    CheckpointFolder,
    Device,
    EngineName,
    Export,
    Force,
    Jobs,
    Mix,
    Model,
    MtpName,
    OutFolder,
    PolicyName,
    Quiet,
    Ranks,
    Restart,
    Reuse,
    SavedCalibration,
    TargetName,
    TraceTimeout,
    Verify,
    parse_mtp,
    parse_size,
    parse_target,
    parse_workers,
)
from fxquant.tools.console import console, print_json, reporter, size

if TYPE_CHECKING:
    from torch import Tensor

    from fxquant.api import CompileReport

UNSEEN_NAMED = 4


def command(
    model: Model,
    policy: PolicyName = None,
    out: OutFolder = None,
    target: TargetName = "ascend",
    tp: Ranks = 1,
    mtp: MtpName = None,
    mix: Mix = None,
    export: Export = True,
    calib: CalibrationFile = None,
    samples: Annotated[int, typer.Option(help="Documents to calibrate on.", min=1)] = 32,
    seq_len: Annotated[int, typer.Option(help="Most tokens of a document.", min=2)] = 256,
    batch_size: Annotated[int, typer.Option(help="Documents to calibrate on at a time.", min=1)] = 1,
    device: Device = "cpu",
    calibration: SavedCalibration = None,
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file, such as 4GiB or 500MB.")] = "4GiB",
    kv_cache: Annotated[str, typer.Option(help="float: the one choice, see --kv-cache int8.")] = "float",
    verify: Verify = True,
    jobs: Jobs = None,
    engine: EngineName = "local",
    address: Address = None,
    reuse: Reuse = None,
    restart: Restart = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Quantize MODEL under a policy and write what an engine loads.

    Traces the model, calibrates static layers, rewrites the graph, writes weights and graph, and verifies them. Killed
    at any moment, the same command goes on where it was.
    """
    from fxquant.api import CompileOptions, compile

    options = CompileOptions(
        policy, out, parse_target(target), calib, samples, seq_len, checkpoint, trace_timeout,
        parse_size(max_shard_size), force, verify, kv_cache, tp, parse_mtp(mtp), mix, export,
        calibration, parse_workers(engine, jobs, address), reuse, restart, batch_size, device,
    )  # fmt: skip
    report = compile(model, options, reporter(quiet or as_json))
    print_json(as_document(report)) if as_json else print_report(report)


def as_document(report: "CompileReport") -> dict:
    """The report for scripts."""
    return {
        "out": str(report.out),
        "way_in": report.way_in,
        "structural_hash": report.structural_hash,
        "policy": report.policy.name,
        "target": report.target.value,
        "ledger": report.ledger.as_json()["totals"],
        "unverified": report.unverified,
        "serve": report.contract.serve_text(report.out),
        "idle_rules": [str(rule) for rule in report.idle_rules],
        "files": {file.name: file.nbytes for file in report.output.files},
        "bytes": asdict(report.output.work),
        "expert_tokens": {module: counts.tolist() for module, counts in routed(report).items()},
        "verification": report.verification.as_json() if report.verification else None,
    }


def routed(report: "CompileReport") -> "dict[str, Tensor]":
    """Module that routes → int64 [E]: how many calibration tokens each expert saw."""
    return report.calibration.experts if report.calibration else {}


def unseen_line(report: "CompileReport") -> str:
    """How many experts no calibration token went to, and the first of them; nothing where there is none."""
    counts = routed(report)
    names = [f"{module}: {i}" for module, seen in counts.items() for i in (seen == 0).nonzero().flatten().tolist()]
    if not names:
        return ""
    first = ", ".join(names[:UNSEEN_NAMED]) + (", …" if len(names) > UNSEEN_NAMED else "")
    return (
        f"{len(names):,} of {sum(map(len, counts.values())):,} experts saw no token of the calibration text ({first})"
    )


def written_line(report: "CompileReport") -> str:
    """How the bytes of the weights came there: `13.4 MB quantized, 2 MB copied`."""
    parts = asdict(report.output.work)
    return ", ".join(f"{size(nbytes)} {how}" for how, nbytes in parts.items() if nbytes)


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
    if unseen := unseen_line(report):
        console.print(f"[yellow]{unseen}[/]", highlight=False)
    if report.verification:
        console.print(verification_table(report.verification))
    written = sum(file.nbytes for file in report.output.files)
    console.print(f"[bold]{report.out}[/]  {size(written)} of weights, policy {report.policy.name}", highlight=False)
    console.print(f"[dim]{written_line(report)}[/]", highlight=False)
    console.print(f"[dim]from a {report.way_in}, graph {report.structural_hash[:12]}[/]", highlight=False)
    deployed = report.output.deployment
    if deployed is not None and deployed.steps:
        before, after = deployed.steps[0].calls_before, deployed.steps[-1].calls_after
        console.print(f"NPU graph of {before:,} operators, fused to {after:,}: fxquant show --fused", highlight=False)
    for reason in report.unverified:
        console.print(f"[yellow]unverified[/] {reason}", highlight=False)
    console.print(f"[dim]for {report.contract.title}[/]", highlight=False)
    console.print(f"[dim]{report.contract.serve_text(report.out)}[/]", highlight=False)
