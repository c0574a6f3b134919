"""fxquant plan"""

import gc
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fxquant.engines.table import DEFAULT
from fxquant.tools.compile_options import (
    AsJson,
    CheckpointFolder,
    ExpertRanks,
    GraphOnly,
    Jobs,
    Mix,
    MtpName,
    OnnxProfileName,
    OutFolder,
    PolicyName,
    Ranks,
    ShardSize,
    TargetName,
    TraceTimeout,
    parse_mtp,
    parse_profile,
    parse_size,
    parse_target,
)
from fxquant.tools.console import console, print_json, print_line, print_notes, print_whole, size
from fxquant.tools.stages import duration
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.planning.host_benchmark import Machine
    from fxquant.planning.plan import Plan

SHOWN_FILES = 4
MOST = 100_000
"""Maximum cores, and GB/s, of an assumed machine."""


def command(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint folder (weights not needed), a config.json, or a model.py.",
            show_default=False,
        ),
    ],
    policy: PolicyName = None,
    out: OutFolder = None,
    target: TargetName = DEFAULT.value,
    tp: Ranks = None,
    ep: ExpertRanks = None,
    graph_only: GraphOnly = False,
    mtp: MtpName = None,
    mix: Mix = None,
    onnx_profile: OnnxProfileName = None,
    max_shard_size: ShardSize = "4GiB",
    jobs: Jobs = None,
    cores: Annotated[
        int | None, typer.Option(metavar="N", help="Estimate for N cores of this machine's speed.", min=1, max=MOST)
    ] = None,
    disk: Annotated[
        float | None, typer.Option(metavar="GB/S", help="Estimate for a disk of this speed.", min=0.001, max=MOST)
    ] = None,
    checkpoint: CheckpointFolder = None,
    trace_timeout: TraceTimeout = 120.0,
    as_json: AsJson = False,
) -> None:
    """Estimate what compile would write, how long it would take and how much memory.

    File sizes are exact, and no weights are needed. Benchmarks this host for about a second.
    """
    from fxquant.gc_pause import uncollected
    from fxquant.planning.host_benchmark import Measuring

    with Measuring(out or Path.cwd()) as measuring, uncollected():  # before anything imports torch
        from fxquant.compilation.options import CompileOptions
        from fxquant.planning.plan import plan

        options = CompileOptions(
            policy=policy, out=out, target=parse_target(target), checkpoint=checkpoint, trace_timeout=trace_timeout,
            max_shard_size=parse_size(max_shard_size), tp=tp, ep=ep,
            mtp=parse_mtp(mtp), mix=mix, graph_only=graph_only, onnx_profile=parse_profile(onnx_profile),
        )  # fmt: skip
        planned = plan(model, options, jobs, lambda machine: _assumed(machine, cores, disk), measuring)
        print_json(planned.as_json()) if as_json else print_plan(planned)
        gc.freeze()  # the process ends here: a last search for garbage would take longer than the tables


def _assumed(machine: "Machine", cores: int | None, disk: float | None) -> "Machine":
    if cores is not None:
        machine = replace(machine, cores=cores)
    return machine if disk is None else replace(machine, disk_read=disk, disk_write=disk, disk_unknown="")


def print_plan(plan: "Plan", console: Console = console) -> None:
    """Print rows, files, time, memory and totals."""
    title = f"{plan.model}: {plan.policy} for {plan.target}, from a {plan.input_kind}"
    headings = ("kind", "scheme", "modules", "parameters", "bytes in", "bytes out")
    table = NamedTable(title, headings, names=2)
    for row in sorted(plan.rows, key=lambda row: (row.kind, row.scheme)):
        numbers = (row.modules, row.parameters, row.bytes_in, row.bytes_out)
        table.add_row(row.kind, row.scheme, *(f"{number:,}" for number in numbers))
    console.print(table)
    console.print(_files(plan))
    for line in (*_time(plan), _memory(plan)):
        print_line(line, to=console)
    for line in (*plan.choices, *plan.reserves):
        print_line((line, "dim"), to=console)
    for reason in plan.unverified:
        print_line(("unverified ", "yellow"), reason, to=console)
    print_notes(plan.notes, console)
    modules, parameters = (sum(getattr(row, key) for row in plan.rows) for key in ("modules", "parameters"))
    print_line(
        (size(plan.bytes_out), "bold"),
        f" out of {size(plan.bytes_in)}: {parameters:,} parameters of {modules:,} "
        f"modules; {plan.operators[0]:,} operators; {plan.operators[1]:,} after rewriting; {_total(plan)}, "
        f"{size(plan.memory.peak)} of memory",
        to=console,
    )
    print_whole(plan.serve, "dim", console)


def _files(plan: "Plan") -> NamedTable:
    table = NamedTable("", ("file", "bytes"))
    files = list(plan.files.items())
    hidden = files[SHOWN_FILES - 1 : -1] if len(files) > SHOWN_FILES else []
    for name, nbytes in files:
        if (name, nbytes) not in hidden:
            table.add_row(name, f"{nbytes:,}")
        elif (name, nbytes) == hidden[0]:
            table.add_row(f"… {len(hidden)} more", f"{sum(more for _, more in hidden):,}")
    for name, nbytes in plan.documents.items():
        table.add_row(name, f"{nbytes:,}")
    return table


def _time(plan: "Plan") -> list[str]:
    time, machine = plan.time, plan.machine
    if time.read is None or time.write is None:
        disk = f"unknown ({machine.disk_unknown})"
    else:
        disk = (
            f"{plan.bytes_in / 1e9:,.2f} GB / {machine.disk_read:.2f} GB/s + {plan.bytes_out / 1e9:,.2f} GB / "
            f"{machine.disk_write:.2f} GB/s = {time.disk:,.1f} s"
        )
    known = [kernel for kernel, seconds in time.compute.items() if seconds is not None]
    parts = [f"{plan.work[kernel] / 1e9:,.2f} G / {machine.kernels[kernel]:.2f} G/s ({kernel})" for kernel in known]
    compute = f"({' + '.join(parts)}) / {time.workers} workers = {time.computing:,.1f} s"
    unknown = ", ".join(kernel for kernel in time.compute if kernel not in known)
    if unknown:
        compute += f", and {unknown}: no rate yet, kernels are still compiling (first run only); run plan again"
    total = f"max of both + {time.fixed:.1f} s of tracing, passes and layout = {_total(plan)}"
    return [f"disk     {disk}", f"compute  {compute}", f"time     {total}"]


def _memory(plan: "Plan") -> str:
    memory = plan.memory
    workers = f"{memory.workers} workers × {size(memory.per_worker)}"
    parts = f"{size(memory.base)} graph and layout + {size(memory.kernels)} kernels + {workers}"
    return f"memory   {parts} = {size(memory.peak)}"


def _total(plan: "Plan") -> str:
    return f"{'' if plan.time.complete else 'at least '}{duration(plan.time.total)}"
