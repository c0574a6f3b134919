"""What our contract says of a policy on ranks, with experts split or dealt out."""

from dataclasses import replace
from functools import cache
from pathlib import Path

from folders import Source

from fxquant.engines.check_contract import Linear, check, refusal
from fxquant.engines.contract import load_contract
from fxquant.engines.table import ENGINES, Target
from fxquant.passes import AssignSchemes
from fxquant.passes.check_contract import linears
from fxquant.planning.support_matrix import float_program
from fxquant.policy.policy import load_policy
from fxquant.program.program import MtpLayers


def refused(source: Source, checkpoint: Path, ranks: int, parallel: str) -> str | None:
    """The first refusal, None without one."""
    described, contract = _linears(source.policy, source.target, checkpoint), load_contract(source.target)
    found = refusal(check(contract, described, ranks, ep=ranks if parallel == "ep" else 1))
    return None if found is None else found.fact


@cache
def _linears(policy: str, target: Target, checkpoint: Path) -> list[Linear]:
    assigned = replace(float_program(checkpoint), recipes={}, rules={}, unused_rules=[], mtp=MtpLayers())
    engine = ENGINES[target]
    AssignSchemes(load_policy(policy), (), engine.weight_format, engine.int4_group_size, target).apply(assigned)
    return linears(assigned)
