"""fxquant targets"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fxquant.tools import completion
from fxquant.tools.compile_options import AsJson, parse_target
from fxquant.tools.console import console, errors, print_json, print_line, print_notes, print_text, print_whole
from fxquant.tools.stages import reporter
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.engines.table import Target
    from fxquant.planning.support_matrix import Deployment

EVIDENCE = {"read": "r", "documented": "d", "assumed": "a"}
"""What nobody ran, in one letter."""
MARKS = {"accepted": ("✓", "green"), "unverified": ("?", "yellow"), "refused": ("✗", "red")}


def command(
    model: Annotated[
        Path | None,
        typer.Argument(
            metavar="MODEL", help="A config.json, a folder with one, or a model.py. [dim]default: DeepSeek-V3 671B[/]"
        ),
    ] = None,
    table: Annotated[bool, typer.Option("--table", help="Table of policy × target × ranks for MODEL.")] = False,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="POLICY",
            autocompletion=completion.policies,
            help="Policies. [dim]default: all shipped[/]",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target", "-t", metavar="TARGET", autocompletion=completion.targets, help="Targets. [dim]default: all[/]"
        ),
    ] = None,
    tp: Annotated[
        list[int] | None,
        typer.Option("--tp", metavar="N", help="Tensor-parallel ranks. [dim]default: 1, 2, 4, 8, 16[/]", min=1),
    ] = None,
    ep: Annotated[
        int | None,
        typer.Option(
            "--ep", metavar="N", help="Expert-parallel ranks, a multiple of --tp. [dim]default: none[/]", min=1
        ),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each engine loads, and which policies run on it with how many ranks.

    Verdicts: accepted, refused, or unverified (neither has been shown). Evidence: run (the engine's own code loaded
    such files), read (in its source), documented, or assumed. No weights are read.
    """
    from fxquant.engines.table import Target

    targets = [parse_target(name) for name in target] if target else list(Target)
    if not (table or model or policy or tp or ep or markdown):
        _print_contracts(targets, as_json)
        return
    from fxquant.checkpoint.config_notes import config_notes
    from fxquant.planning.support_matrix import RANKS, deployments, float_program
    from fxquant.policy.policy import load_policy, shipped_policies

    ranks = tp or list(RANKS)
    policies = [load_policy(name) for name in policy or shipped_policies()]  # refused before the model is traced
    report = reporter(as_json)
    program = float_program(model, report)
    verdicts = deployments(program, policies, targets, ranks, report, ep or 1)
    if as_json:
        print_json([vars(deployment) for deployment in verdicts])
    elif markdown:
        print_text(markdown_table(verdicts, ranks))
    else:
        print_table(verdicts, ranks)
    print_notes(config_notes(program.config), errors if as_json or markdown else console)
    if policy and tp and not as_json and any(deployment.verdict == "refused" for deployment in verdicts):
        raise typer.Exit(1)


def _print_contracts(targets: list["Target"], as_json: bool) -> None:
    from fxquant.engines.contract import load_contract
    from fxquant.engines.rank_layout import served_layout
    from fxquant.engines.serving import Serving
    from fxquant.engines.table import ENGINES
    from fxquant.lowering.output_folder.serving_page import release_words

    contracts = {target: load_contract(target) for target in targets}
    layouts = {target: served_layout(contract, (), None, None) for target, contract in contracts.items()}
    serve = {target: ENGINES[target].serve(Serving("OUT", layouts[target])) for target in targets}
    if as_json:
        print_json([loaded.model_dump(mode="json") | {"serve": serve[target]} for target, loaded in contracts.items()])
        return
    for target, contract in contracts.items():
        headings = ("modules", "scheme", "verdict", "evidence", "reference")
        table = NamedTable(
            f"{contract.target}: {contract.title}", headings, prose=("verdict", "evidence", "reference"), names=2
        )
        for cell in contract.cells:
            sizes = "" if cell.group_size is None else f" group_size {', '.join(map(str, cell.group_size))}"
            where = ", ".join(cell.kind) + ("" if cell.module == "*" else f" ({cell.module})")
            where += {None: "", True: " with a bias", False: " without a bias"}[cell.bias]
            where += f" of {', '.join(cell.dtype)} models" if cell.dtype else ""
            mark, style = MARKS[cell.verdict]
            verdict = f"{mark} {cell.verdict}" + (f": {cell.why}" if cell.why else "")
            table.add_row(where, ", ".join(cell.scheme) + sizes, (verdict, style), cell.evidence, cell.reference)
        console.print(table)
        sizes = ", ".join(map(str, contract.tensor_parallel.sizes))
        print_line(f"tensor parallel {sizes}; description: {', '.join(contract.header)}")
        for release in contract.releases:
            known = f"{release.evidence}: {release.reference}"
            print_line((f"{release_words(release)} ({known})", "dim"))
        print_whole(serve[target], "dim")
        console.print()


def footnotes(verdicts: list["Deployment"]) -> dict[str, int]:
    """Words of refused and unverified deployments → their numbers, from 1."""
    words = dict.fromkeys(deployment.words for deployment in verdicts if deployment.words)
    return {text: number for number, text in enumerate(words, 1)}


def choices(verdicts: list["Deployment"]) -> list[str]:
    """What `auto` became, once each."""
    return list(dict.fromkeys(deployment.choice for deployment in verdicts if deployment.choice))


def rows(verdicts: list["Deployment"], ranks: list[int]) -> list[tuple[str, str, list["Deployment"]]]:
    """Policy, target, and one deployment per rank count."""
    step = len(ranks)
    groups = [verdicts[start : start + step] for start in range(0, len(verdicts), step)]
    return [(group[0].policy, group[0].target.value, group) for group in groups]


def _headings(verdicts: list["Deployment"], ranks: list[int]) -> list[str]:
    """`TP 8`, or `TP 8 EP 16`."""
    ep = verdicts[0].ep if verdicts else 1
    return [f"TP {count}" + (f" EP {ep}" if ep > 1 else "") for count in ranks]


def print_table(verdicts: list["Deployment"], ranks: list[int], console: Console = console) -> None:
    """The table and its footnotes."""
    headings = ("policy", "target", *_headings(verdicts, ranks))
    table = NamedTable("policy × target × tensor-parallel ranks", headings, left=headings, names=2)
    notes, previous = footnotes(verdicts), ""
    for policy, target, group in rows(verdicts, ranks):
        if previous and policy != previous:
            table.add_section()
        cells = [_mark(deployment, notes) for deployment in group]
        table.add_row(policy if policy != previous else "", target, *cells)
        previous = policy
    console.print(table)
    for text, number in notes.items():
        print_line((f"{number} ", "dim"), text, to=console)
    for evidence in dict.fromkeys(deployment.evidence for deployment in verdicts if _reserved(deployment)):
        print_line((f"{EVIDENCE[evidence]} accepted ({evidence}), nobody ran it", "dim"), to=console)
    for choice in choices(verdicts):
        print_line((choice, "dim"), to=console)


def _mark(deployment: "Deployment", notes: dict[str, int]) -> tuple[str, str]:
    mark, style = MARKS[deployment.verdict]
    mark += f" {EVIDENCE[deployment.evidence]}" if _reserved(deployment) else ""
    return mark + (f" {notes[deployment.words]}" if deployment.words else ""), style


def _words(deployment: "Deployment", notes: dict[str, int]) -> str:
    note = f" ({notes[deployment.words]})" if deployment.words else ""
    known = f" ({deployment.evidence})" if _reserved(deployment) else ""
    return deployment.verdict.value + known + note


def _reserved(deployment: "Deployment") -> bool:
    """Whether it is accepted without that anybody ran it."""
    return deployment.verdict == "accepted" and deployment.evidence != "run"


def markdown_table(verdicts: list["Deployment"], ranks: list[int]) -> str:
    """The same table as Markdown."""
    notes = footnotes(verdicts)
    lines = ["| policy | target | " + " | ".join(_headings(verdicts, ranks)) + " |"]
    lines.append("|---" * (2 + len(ranks)) + "|")
    for policy, target, group in rows(verdicts, ranks):
        cells = (_words(deployment, notes) for deployment in group)
        lines.append(f"| {policy} | {target} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {text}" for text, number in notes.items())]
    return "\n".join([*lines, *([""] if notes else []), *choices(verdicts)])
