"""Rank layout of a deployment: from contract, linears and what the user asked for."""

from collections.abc import Iterable, Iterator

from fxquant.engines.check_contract import Linear, check, refusal
from fxquant.engines.contract import Contract
from fxquant.engines.serving import RankLayout

MOST = 8
"""Ranks of one host, the most that are served on unless the user asks for more."""


def checked_layout(
    contract: Contract, linears: Iterable[Linear], tp: int | None, ep: int | None, mix: bool | None = None
) -> RankLayout:
    """The layout that an output is checked for: as asked, one rank if nothing was.

    With `ep` alone the largest number of tensor-parallel ranks that is not refused.
    """
    if tp is None and ep is not None and ep > 1:
        return _first(contract, linears, list(_with_experts(contract, ep)), mix)
    return RankLayout(tp or 1, ep or 1)


def served_layout(
    contract: Contract, linears: Iterable[Linear], tp: int | None, ep: int | None, mix: bool | None = None
) -> RankLayout:
    """The layout to serve on: as asked, else the most ranks up to 8 that the contract does not refuse for this model.

    Int4 experts stay whole where their number allows it: of the releases that a contract has, some don't load them
    split. Others are split unless that is refused.
    """
    if tp is not None or ep is not None:
        return checked_layout(contract, linears, tp, ep, mix)
    linears = list(linears)
    whole = any(linear.experts and linear.recipe.int4 for linear in linears)
    return _first(contract, linears, list(_layouts(contract, whole)), mix)


def _layouts(contract: Contract, whole: bool) -> Iterator[RankLayout]:
    for size in sorted(contract.tensor_parallel.sizes, reverse=True):
        if 1 < size <= MOST:
            yield from sorted((RankLayout(size), RankLayout(size, size)), key=lambda each: (each.ep > 1) is not whole)
    yield RankLayout()


def _with_experts(contract: Contract, ep: int) -> Iterator[RankLayout]:
    sizes = sorted((size for size in contract.tensor_parallel.sizes if size <= MOST), reverse=True)
    yield from (RankLayout(size, ep) for size in sizes if ep % size == 0)
    yield RankLayout(1, ep)


def _first(contract: Contract, linears: Iterable[Linear], layouts: list[RankLayout], mix: bool | None) -> RankLayout:
    """The first that is not refused; if all are, the last, whose refusal has nothing to do with their number."""
    linears = list(linears)
    accepted = (layout for layout in layouts if refusal(check(contract, linears, layout.tp, mix, layout.ep)) is None)
    return next(accepted, layouts[-1])
