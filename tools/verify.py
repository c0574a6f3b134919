"""fxquant verify"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from fxquant.errors import FxquantError
from fxquant.tools.compile_options import parse_target
from fxquant.tools.console import console, print_json, reporter

if TYPE_CHECKING:
    from fxquant.lowering.verify import VerifyReport

SHOWN_MISSES = 10


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    against: Annotated[
        Path | None, typer.Option(help="The model it was made from. [dim]default: the path in the manifest[/]")
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option("--tp", metavar="N", help="Ranks to read it on. [dim]default: as compiled for[/]", min=1),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", "-t", help="The target of OUT. [dim]default: the manifest's[/]")
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Derive the weights anew from the source and compare every byte.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Rebuild N modules, not all.", min=1, show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Check every tensor, however large the model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Read OUT back and hold it against its source, its formulas and its graph.

    Without a source it says “structure only”. Exits with 1 on any miss.
    """
    from fxquant.api import verify
    from fxquant.lowering.verify import Rebuild

    if sample is not None and not rebuild:
        raise FxquantError(f"--sample {sample}", "of what to rebuild.", "Pass --rebuild with it.")
    anew = Rebuild(sample) if rebuild else None
    engine = None if target is None else parse_target(target)
    report = verify(out, against, full, reporter(quiet or as_json), tp, engine, anew)
    print_json(report.as_json()) if as_json else console.print(verification_table(report))
    if not report.ok:
        if not as_json:
            _print_misses(report)
        raise typer.Exit(1)


def verification_table(report: "VerifyReport") -> Table:
    """One row a check."""
    colour = {"verified": "green", "sample verified": "green", "structure only": "yellow"}.get(report.verdict, "red")
    table = Table(title=f"[{colour}]{report.verdict}[/]", title_justify="left")
    for heading, justify in (("check", "left"), ("checked", "right"), ("misses", "right"), ("largest error", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for check in report.checks:
        checked = f"{check.checked:,}" if check.checked >= check.total else f"{check.checked:,} of {check.total:,}"
        misses = "0" if check.ok else f"[red]{len(check.misses):,}[/]"
        table.add_row(check.name, checked, misses, check.worst)
    if report.logit_noise is not None:
        table.caption = f"last-bit noise moves a logit of this graph by up to {report.logit_noise:.2g}"
        table.caption_justify = "left"
    return table


def _print_misses(report: "VerifyReport") -> None:
    for check in report.checks:
        for miss in check.misses[:SHOWN_MISSES]:
            console.print(f"[red]✗[/] {escape(check.name)}: {escape(miss)}", highlight=False)
        if len(check.misses) > SHOWN_MISSES:
            console.print(f"  … and {len(check.misses) - SHOWN_MISSES} more")
