"""fxquant verify"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group

from fxquant.errors import FxquantError
from fxquant.tools.compile_options import parse_target
from fxquant.tools.completion import targets
from fxquant.tools.console import console, print_json, print_line
from fxquant.tools.stages import reporter
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.verification import VerifyReport

SHOWN_MISSES = 12
"""Lines of misses, over all checks; each failed check has at least one."""
LOGITS = ("", "tokens", "KL per token", "largest KL", "top-1 agreement", "logits off by")
NUMBER = re.compile(r"(?<![A-Za-z_])\d[\d.,e+-]*")


def command(
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="A compiled folder, or one that others wrote.", show_default=False)
    ],
    against: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The source model. [dim]default: the path in the manifest[/]"),
    ] = None,
    tp: Annotated[
        int | None,
        typer.Option(
            "--tp", metavar="N", help="Tensor-parallel ranks to check for. [dim]default: those of the compile[/]", min=1
        ),
    ] = None,
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep",
            metavar="N",
            help="Expert-parallel ranks to check for. [dim]default: those of the compile[/]",
            min=1,
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            "-t",
            metavar="TARGET",
            autocompletion=targets,
            help="Target of OUT. [dim]default: from the manifest[/]",
        ),
    ] = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Quantize the weights again from the source and compare every byte.")
    ] = False,
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Rebuild N modules only.", min=1, show_default=False)
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Check every tensor, also of a large model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")] = False,
) -> None:
    """Check OUT against its source checkpoint, the quantization formulas and its graph.

    OUT may be a folder of the reference quantizer, without a file of fxquant. Without the source the verdict is
    “structure only”. Exit code 1 if anything differs; 0 says that nothing did of what was looked at.
    """
    from fxquant.api import verify
    from fxquant.verification import Rebuild

    if sample is not None and not rebuild:
        raise FxquantError(f"--sample {sample}", "applies only to --rebuild.", "Pass --rebuild as well.")
    anew = Rebuild(sample) if rebuild else None
    engine = None if target is None else parse_target(target)
    report = verify(out, against, full, reporter(quiet or as_json), tp, engine, anew, ep)
    if as_json:
        print_json(report.as_json())
    else:
        console.print(verification_tables(report))
        _print_misses(report)
        for file, what in report.unread.items():
            print_line(("not looked at: ", "dim"), f"{file}: {what}")
    if not report.ok:
        raise typer.Exit(1)


def verification_tables(report: "VerifyReport") -> Group:
    """One row per check, and below it how far logits are."""
    table = _checks_table(report)
    return Group(table, _logits_table(report)) if report.noise or report.end_to_end else Group(table)


def _checks_table(report: "VerifyReport") -> NamedTable:
    colour = {
        "verified": "green",
        "sample verified": "green",
        "structure only": "yellow",
        "partly verified": "yellow",
    }.get(report.verdict, "red")
    headings = ("check", "checked", "misses", "largest error")
    table = NamedTable((report.verdict, colour), headings, prose=("largest error",))
    for check in report.checks:
        checked = f"{check.checked:,}" if check.checked >= check.total else f"{check.checked:,} of {check.total:,}"
        misses = "0" if check.ok else (f"{len(check.misses):,}", "red")
        table.add_row(check.name, checked, misses, check.worst)
    return table


def _logits_table(report: "VerifyReport") -> NamedTable:
    table = NamedTable("logits, from those of the rewritten graph", LOGITS)
    rows = {"ONNX graph, end to end": report.end_to_end, "last-bit noise": report.noise}
    for name, found in rows.items():
        if found is not None:
            kl = (f"{found.kl_mean:.2g}", f"{found.kl_max:.2g}")
            table.add_row(name, f"{found.tokens:,}", *kl, f"{found.top1_agreement:.1%}", f"{found.logit:.2g}")
    return table


def _print_misses(report: "VerifyReport") -> None:
    failed = [check for check in report.checks if not check.ok]
    left = 0
    for check in failed:
        kinds, shown = alike(check.misses), max(1, SHOWN_MISSES // len(failed))
        for first, *others in kinds[:shown]:
            more = f" (and {len(others):,} more like it)" if others else ""
            print_line(("✗ ", "red"), f"{check.name}: {first}{more}")
        left += sum(map(len, kinds[shown:]))
    if left:
        console.print(f"  … and {left:,} more; --json has all")


def alike(misses: Iterable[str]) -> list[list[str]]:
    """Misses that differ in numbers alone together, such as those of all experts, in order of the first of each."""
    kinds: dict[str, list[str]] = {}
    for miss in misses:
        kinds.setdefault(NUMBER.sub("#", miss), []).append(miss)
    return list(kinds.values())
