"""Contract check: schemes × the target's contract, before any weight is read."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxquant import ops
from fxquant.checkpoint.config import parse_config
from fxquant.engines.check_contract import Finding, Linear, check, refusal
from fxquant.engines.contract import Contract
from fxquant.engines.rank_layout import checked_layout
from fxquant.errors import FxquantError
from fxquant.models.mtp import mtp_linears
from fxquant.passes.base import Pass, PassResult
from fxquant.policy.kinds import Kind
from fxquant.program.linears import LinearSite, linear_sites
from fxquant.program.operands import operand
from fxquant.program.program import Program
from fxquant.schemes.schemes import Recipe, Scheme


@dataclass
class CheckContract(Pass):
    """Raises FxquantError for the first thing the engine refuses; what is unverified is in the result's findings.

    tp   tensor-parallel ranks it will be served on; None: one, or what fits `ep`
    ep   expert-parallel ranks, which have whole experts; None: none
    mix  whether the engine will run shared experts as routed ones; None: as the policy needs it
    """

    policy: str
    contract: Contract
    tp: int | None = None
    ep: int | None = None
    mix: bool | None = None
    name = "check-contract"

    def apply(self, program: Program) -> PassResult:
        described = linears(program)
        layout = checked_layout(self.contract, described, self.tp, self.ep, self.mix)
        findings = check(self.contract, described, layout.tp, self.mix, layout.ep)
        refused = refusal(findings)
        if refused is not None:
            raise FxquantError(*as_error(refused, self.policy, self.contract))
        unverified: dict[str, str] = {}
        for finding in findings:
            unverified.setdefault(finding.fact, finding.reference)
        return PassResult(self.name, findings=unverified)


def as_error(finding: Finding, policy: str, contract: Contract) -> tuple[str, str, str]:
    """Place, fact and way out of a refusal."""
    place = f"layer {finding.module}" if finding.module else f"policy {policy}"
    fact = f"{finding.fact}; target {contract.target} refuses it ({finding.reference})."
    return place, fact, finding.way_out or "Choose another policy or target: fxquant targets lists them."


def linears(program: Program) -> list[Linear]:
    """Every linear, float ones as scheme FLOAT, with all that contracts need of it."""
    attention = program.nodes(ops.mla_attention)
    heads: Any = operand(attention[0], "num_heads") if attention else 0
    recipes = dict(program.recipes)
    for site in linear_sites(program):
        if site.module not in recipes:
            recipes[site.module] = _float(program, site)
    described = []
    for recipe in recipes.values():
        weight = program.parameters.get(recipe.weight_target)
        kind = Kind.OTHER if weight is None else weight.kind
        described.append(Linear(recipe, kind, heads if kind is Kind.ATTENTION else 0))
    return described + list(_predicting(program))


def _predicting(program: Program) -> Iterator[Linear]:
    """The quantized linears of prediction layers."""
    if program.mtp.recipes:
        config = parse_config(program.config, "config.json")
        kinds = {linear.module: linear.kind for path in program.mtp.layers for linear in mtp_linears(config, path)}
        for module, recipe in program.mtp.recipes.items():
            yield Linear(recipe, Kind.MTP, inside=kinds.get(module))


def _float(program: Program, site: LinearSite) -> Recipe:
    n, k = program.graph.tensor(str(site.weight.target)).shape[-2:]
    modules = site.parameter.modules
    return Recipe(site.module, modules, Scheme.FLOAT, 0, n, k, site.bias is not None, site.row_parallel, program.dtype)
