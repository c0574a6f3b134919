"""fxquant targets"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fxquant.tools.compile_options import AsJson, parse_target
from fxquant.tools.console import console, print_json

if TYPE_CHECKING:
    from fxquant.deployments import Deployment
    from fxquant.targets import Target

MARKS = {"accepted": "[green]✓[/]", "unverified": "[yellow]?[/]", "refused": "[red]✗[/]"}


def command(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[MODEL]", help="Folder with a config.json. [dim]default: DeepSeek-V3 671B[/]"),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Policy × target × ranks for MODEL.")] = False,
    policy: Annotated[
        list[str] | None, typer.Option("--policy", "-p", help="Policies. [dim]default: all shipped[/]")
    ] = None,
    target: Annotated[list[str] | None, typer.Option("--target", "-t", help="Targets. [dim]default: all[/]")] = None,
    tp: Annotated[list[int] | None, typer.Option("--tp", help="Ranks. [dim]default: 1, 2, 4, 8, 16[/]", min=1)] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """What each engine loads, and which policies run on it with how many ranks.

    A verdict is accepted, refused, or unverified: nobody has shown either. No weights are read.
    """
    from fxquant.targets import Target

    targets = [parse_target(name) for name in target] if target else list(Target)
    if not (table or model or policy or tp or markdown):
        _print_contracts(targets, as_json)
        return
    from fxquant.deployments import RANKS, deployments, float_program
    from fxquant.policy import shipped_policies

    ranks = tp or list(RANKS)
    found = deployments(float_program(model), policy or shipped_policies(), targets, ranks)
    if as_json:
        print_json([vars(one) for one in found])
    elif markdown:
        print(markdown_table(found, ranks))
    else:
        print_table(found, ranks)
    if policy and tp and not as_json and any(one.verdict == "refused" for one in found):
        raise typer.Exit(1)


def _print_contracts(targets: list["Target"], as_json: bool) -> None:
    from fxquant.contracts import load_contract

    contracts = [load_contract(target) for target in targets]
    if as_json:
        print_json([contract.model_dump(mode="json") for contract in contracts])
        return
    for contract in contracts:
        table = Table(title=f"[bold]{contract.target}[/]  {contract.title}", title_justify="left")
        for heading in ("modules", "scheme", "verdict", "source"):
            table.add_column(heading, overflow="fold")
        for cell in contract.cells:
            sizes = "" if cell.group_size is None else f" group_size {', '.join(map(str, cell.group_size))}"
            where = ", ".join(cell.kind) + ("" if cell.module == "*" else f" ({cell.module})")
            where += {None: "", True: " with a bias", False: " without a bias"}[cell.bias]
            verdict = f"{MARKS[cell.verdict]} {cell.verdict}" + (f": {cell.why}" if cell.why else "")
            table.add_row(where, ", ".join(cell.scheme) + sizes, verdict, cell.source)
        console.print(table)
        sizes = ", ".join(map(str, contract.tensor_parallel.sizes))
        console.print(f"tensor parallel {sizes}; description: {', '.join(contract.header)}", highlight=False)
        for release in contract.releases:
            until = f" to {release.until}" if release.until else " on"
            span = f" from {release.since}{until}" if release.since else ", since when is not known,"
            console.print(f"[dim]{release.engine}{span} loads {release.loads} ({release.source})[/]", highlight=False)
        console.print(f"[dim]{contract.serve}[/]\n", highlight=False)


def footnotes(found: list["Deployment"]) -> dict[str, int]:
    """Words of refusals and doubts → their numbers, from 1."""
    words = dict.fromkeys(one.words for one in found if one.words)
    return {text: number for number, text in enumerate(words, 1)}


def rows(found: list["Deployment"], ranks: list[int]) -> list[tuple[str, str, list["Deployment"]]]:
    """Policy, target, and one deployment a rank count."""
    step = len(ranks)
    groups = [found[start : start + step] for start in range(0, len(found), step)]
    return [(group[0].policy, group[0].target.value, group) for group in groups]


def print_table(found: list["Deployment"], ranks: list[int], console: Console = console) -> None:
    """The table and its footnotes."""
    notes, table = footnotes(found), Table(title="policy × target × tensor-parallel ranks", title_justify="left")
    for heading in ("policy", "target", *(f"TP {count}" for count in ranks)):
        table.add_column(heading)
    previous = ""
    for policy, target, group in rows(found, ranks):
        if previous and policy != previous:
            table.add_section()
        cells = [MARKS[one.verdict] + (f" {notes[one.words]}" if one.words else "") for one in group]
        table.add_row(policy if policy != previous else "", target, *cells)
        previous = policy
    console.print(table)
    for text, number in notes.items():
        console.print(f"[dim]{number}[/] {text}", highlight=False)


def markdown_table(found: list["Deployment"], ranks: list[int]) -> str:
    """The same for a document."""
    notes = footnotes(found)
    lines = ["| policy | target | " + " | ".join(f"TP {count}" for count in ranks) + " |"]
    lines.append("|---" * (2 + len(ranks)) + "|")
    for policy, target, group in rows(found, ranks):
        cells = (one.verdict.value + (f" ({notes[one.words]})" if one.words else "") for one in group)
        lines.append(f"| {policy} | {target} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{number}. {text}" for text, number in notes.items())])
