"""Contract checks: what the target's contract says of the linears of an output."""

from fxquant.engines.check_contract import check as findings
from fxquant.engines.contract import Verdict, load_contract
from fxquant.engines.serving import RankLayout
from fxquant.engines.table import Target
from fxquant.passes.check_contract import linears
from fxquant.program.program import Program
from fxquant.verification.report import Check


def check_contract(program: Program, target: Target, layout: RankLayout) -> Check:
    """The target refuses no linear on these ranks."""
    described = linears(program)
    check = Check(f"contract of {target}, {layout}", len(described))
    verdicts = findings(load_contract(target), described, layout.tp, ep=layout.ep)
    refused = [finding for finding in verdicts if finding.verdict is Verdict.REFUSED]
    check.checked = len(described)
    check.misses += (f"{finding.module}: {finding.fact} ({finding.reference})" for finding in refused)
    return check


def takes_dtype(program: Program, target: Target) -> bool:
    """Whether the target takes models of this dtype."""
    return str(program.dtype).removeprefix("torch.") in load_contract(target).dtypes.accepted


def unverified(program: Program, target: Target, layout: RankLayout) -> frozenset[str]:
    """Modules not shown to be read by the engine, nor to be refused; the report of `compile` names them."""
    verdicts = findings(load_contract(target), linears(program), layout.tp, ep=layout.ep)
    return frozenset(finding.module for finding in verdicts if finding.verdict is Verdict.UNVERIFIED)
