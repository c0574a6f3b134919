"""fxquant convert"""

from pathlib import Path
from typing import Annotated

import typer

from fxquant.tools.compile_options import (
    AsJson,
    Export,
    Force,
    Jobs,
    Quiet,
    Ranks,
    Restart,
    Verify,
    parse_target,
    parse_workers,
)
from fxquant.tools.console import console, print_json, reporter, size


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    target: Annotated[str, typer.Option("--target", "-t", help="What to convert it for.", show_default=False)],
    into: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder. [dim]default: ./<OUT>-<target>[/]")
    ] = None,
    tp: Ranks = 1,
    export: Export = True,
    verify: Verify = True,
    jobs: Jobs = None,
    restart: Restart = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Give a compiled folder the form of another target, integers untouched.

    Refused, with the command that quantizes anew, where the other form has no place for its scales.
    """
    from fxquant.api import convert
    from fxquant.tools.verify import verification_table

    workers = parse_workers("local", jobs, None)
    report = convert(
        out, parse_target(target), into, tp, verify, force, reporter(quiet or as_json), export, workers, restart
    )
    verification = report.verification
    if as_json:
        document = {"out": str(report.out), "target": report.target.value, "policy": report.policy}
        print_json(document | {"verification": verification.as_json() if verification else None})
        return
    if verification:
        console.print(verification_table(verification))
    written = sum(file.nbytes for file in report.output.files)
    console.print(f"[bold]{report.out}[/]  {size(written)} of weights for {report.target}", highlight=False)
