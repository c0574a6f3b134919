"""Support matrix: the verdict on policy × target × number of ranks, known from a config.json alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from fxquant.engines.check_contract import Finding, check, refusal
from fxquant.engines.contract import Evidence, Verdict, load_contract
from fxquant.engines.reserves import weakest
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.frontend.published import published_program
from fxquant.frontend.source import open_source
from fxquant.passes import AssignSchemes
from fxquant.passes.check_contract import linears
from fxquant.policy.policy import Policy
from fxquant.program.program import MtpLayers, Program
from fxquant.progress import Reporter, silent

PUBLISHED = "models/deepseek_v3_671b.json"
RANKS = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Deployment:
    """One policy on one target on tensor-parallel `ranks` and `ep` expert-parallel ones; `words` say why it is refused,
    or what is unverified.

    evidence  how the least known of its acceptances is known
    choice    the group size that `auto` became, and why; "" without such a rule
    """

    policy: str
    target: Target
    ranks: int
    verdict: Verdict
    words: str = ""
    evidence: Evidence = Evidence.RUN
    choice: str = ""
    ep: int = 1


def float_program(model: Path | None = None, report: Reporter = silent) -> Program:
    """The float graph of a MODEL or config.json, or of the published DeepSeek-V3; weights are not needed."""
    make = _published_program if model is None else open_source(model, config_only=True).program
    with report("trace", 1, "graph") as advance:
        program = make()
        advance(1)
    return program


def _published_program() -> Program:
    return published_program((resources.files("fxquant") / PUBLISHED).read_text(encoding="utf-8"), Path(PUBLISHED))


def deployments(
    program: Program,
    policies: Sequence[Policy],
    targets: Sequence[Target],
    ranks: Sequence[int] = RANKS,
    report: Reporter = silent,
    ep: int = 1,
) -> list[Deployment]:
    """Every combination, in the order given. `program` is a float graph, and is not changed."""
    pairs = [(policy, target) for policy in policies for target in targets]
    verdicts = []
    with report("check", len(pairs), "policies on targets") as advance:
        for policy, target in pairs:
            verdicts += _of(program, policy, target, ranks, ep)
            advance(1, at=policy.name)
    return verdicts


def _of(program: Program, policy: Policy, target: Target, ranks: Sequence[int], ep: int) -> list[Deployment]:
    assigned = replace(program, recipes={}, rules={}, unused_rules=[], mtp=MtpLayers())
    try:
        engine = ENGINES[target]
        assigning = AssignSchemes(policy, (), engine.weight_format, engine.int4_group_size, target)
        choice = "; ".join(assigning.apply(assigned).choices)
    except FxquantError as error:  # the policy does not fit the model or format, whatever the number of ranks
        words = f"{error.place}: {error.fact} {error.remedy}".rstrip()
        return [Deployment(policy.name, target, count, Verdict.REFUSED, words, ep=ep) for count in ranks]
    described, contract = linears(assigned), load_contract(target)
    evidence = weakest(contract, described)
    verdicts = (_verdict(policy, target, count, check(contract, described, count, ep=ep), evidence) for count in ranks)
    return [replace(verdict, ep=ep, choice=choice) for verdict in verdicts]


def _verdict(policy: Policy, target: Target, ranks: int, findings: list[Finding], evidence: Evidence) -> Deployment:
    refused = refusal(findings)
    if refused is not None:
        return Deployment(policy.name, target, ranks, Verdict.REFUSED, _words(refused))
    if findings:
        return Deployment(policy.name, target, ranks, Verdict.UNVERIFIED, _words(findings[0]))
    return Deployment(policy.name, target, ranks, Verdict.ACCEPTED, evidence=evidence)


def _words(finding: Finding) -> str:
    name = finding.module.rpartition(".")[2]
    return f"{name + ': ' if name else ''}{finding.fact} ({finding.reference})"
