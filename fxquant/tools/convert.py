"""fxquant convert"""

from pathlib import Path
from typing import Annotated

import typer

from fxquant.tools.compile_options import (
    AsJson,
    ExpertRanks,
    Export,
    Force,
    GraphOnly,
    Jobs,
    OnnxAccuracyLevel,
    OnnxCacheName,
    OnnxInline,
    OnnxLastLogits,
    OnnxProfileName,
    Ranks,
    Restart,
    Silent,
    Verify,
    parse_cache,
    parse_profile,
    parse_target,
    parse_workers,
)
from fxquant.tools.completion import targets
from fxquant.tools.console import console, print_json, print_line, print_whole, size
from fxquant.tools.stages import reporter


def command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A compiled folder, or one that others wrote.", show_default=False)
    ],
    target: Annotated[
        str,
        typer.Option(
            "--target",
            "-t",
            metavar="TARGET",
            help="Target to convert to.",
            show_default=False,
            autocompletion=targets,
        ),
    ],
    into: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FOLDER", help="Output folder. [dim]default: ./<OUT>-<target>[/]"),
    ] = None,
    tp: Ranks = None,
    ep: ExpertRanks = None,
    graph_only: GraphOnly = False,
    against: Annotated[
        Path | None,
        typer.Option(
            "--against",
            "--source",
            metavar="MODEL",
            help="The source model of a folder that others wrote. [dim]default: its config.json describes the model[/]",
        ),
    ] = None,
    onnx_profile: OnnxProfileName = None,
    onnx_accuracy_level: OnnxAccuracyLevel = None,
    onnx_cache: OnnxCacheName = None,
    onnx_last_logits: OnnxLastLogits = False,
    onnx_inline: OnnxInline = False,
    export: Export = True,
    verify: Verify = True,
    jobs: Jobs = None,
    restart: Restart = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Silent = False,
) -> None:
    """Convert a compiled folder to another target; quantized values stay the same.

    Refused if the other target's format cannot store the scales; the error names the command that quantizes again.
    """
    from fxquant.api import OnnxOptions, convert
    from fxquant.tools.verify import verification_tables

    workers = parse_workers("local", jobs, None)
    report = convert(
        out,
        parse_target(target),
        into,
        tp,
        verify,
        force,
        reporter(quiet or as_json),
        export,
        workers,
        restart,
        ep,
        graph_only,
        against,
        OnnxOptions(
            onnx_profile=parse_profile(onnx_profile),
            onnx_accuracy_level=onnx_accuracy_level,
            onnx_cache=parse_cache(onnx_cache),
            onnx_last_logits=onnx_last_logits,
            onnx_inline=onnx_inline,
        ),
    )
    verification = report.verification
    if as_json:
        document = {
            "out": str(report.out),
            "target": report.target.value,
            "policy": report.policy,
            "serve": report.serve,
        }
        results = {"notes": report.notes, "verification": verification.as_json() if verification else None}
        print_json(document | results)
        return
    if quiet:
        return
    if verification:
        console.print(verification_tables(verification))
    for note in report.notes:
        print_line((note, "yellow"))
    written = sum(file.nbytes for file in report.output.files)
    print_whole(str(report.out), "bold")
    print_line(f"{size(written)} of weights for {report.target}")
    print_whole(report.serve, "dim")
