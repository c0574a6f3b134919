"""Reserves: what a contract accepts without that anybody ran it, by how it is known."""

from collections.abc import Iterable

from fxquant.engines.check_contract import Linear
from fxquant.engines.contract import Cell, Contract, Evidence, Verdict

STRENGTH = tuple(Evidence)


def weakest(contract: Contract, linears: Iterable[Linear]) -> Evidence:
    """How the least known acceptance of `linears` is known; RUN if all were run, or there are none."""
    known = (contract.cell(linear.kind, linear.recipe).evidence for linear in linears)
    return max(known, key=STRENGTH.index, default=Evidence.RUN)


def reserves(contract: Contract, linears: Iterable[Linear]) -> list[str]:
    """A line per kind of evidence but RUN, the strongest first: `accepted (read): W8A8 on attention, …`."""
    named: dict[Evidence, dict[str, dict[str, None]]] = {}
    for linear in linears:
        cell = contract.cell(linear.kind, linear.recipe)
        if cell.verdict is Verdict.ACCEPTED and cell.evidence is not Evidence.RUN:
            schemes = named.setdefault(cell.evidence, {})
            schemes.setdefault(_says(linear, cell), {}).setdefault(linear.kind.value)
    lines = []
    for evidence in sorted(named, key=STRENGTH.index):
        parts = [f"{scheme} on {', '.join(kinds)}" for scheme, kinds in sorted(named[evidence].items())]
        lines.append(f"accepted ({evidence}): {'; '.join(parts)}")
    return lines


def _says(linear: Linear, cell: Cell) -> str:
    size = f" with group_size {linear.recipe.group_size}" if linear.recipe.group_size else ""
    return f"{linear.recipe.scheme}{size}" + (f" ({cell.why})" if cell.why else "")
