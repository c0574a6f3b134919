"""Every case that the conformance test shows to released SGLang, what the contract says of it, and the matrix."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outcome import Outcome, Verdict
from sglang_cases import OWN_POLICIES, PER_CHANNEL, STATIC, Case, Folders

from fxquant.engines.check_contract import Finding, check, refusal
from fxquant.engines.contract import load_contract
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.passes.check_contract import linears
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import shipped_policies
from fxquant.program.program_file import load_program

LAYOUTS = [(ranks, "tp") for ranks in (1, 2, 4, 8, 16)] + [(ranks, "ep") for ranks in (2, 4, 8, 16)]
ON_ALL = (PER_CHANNEL, STATIC, "deepseek_w8a8")
"""Policies that are shown on all layouts; others, which do not load or load as these do, on one rank."""
ON_ONE = (
    *(name for name in shipped_policies() if name not in ON_ALL),
    *(name for name in OWN_POLICIES if name != "shifted"),
)
TWO_LEVEL = "groups_of_256"
OTHER_SOURCES = [(policy, source) for source in ("fp8", "fp16", "biased") for policy in (PER_CHANNEL, STATIC)]
DRAFTS = [(PER_CHANNEL, "float"), (PER_CHANNEL, "quant"), (STATIC, "quant")]
DRAFT_LAYOUTS = [(1, "tp"), (4, "tp"), (8, "ep")]


@dataclass(frozen=True)
class Shown:
    """A case, and what its folder was compiled from."""

    case: Case
    policy: str
    source: str = "bf16"
    mtp: str = "none"

    @property
    def name(self) -> str:
        """For messages."""
        draft = ", its draft" if self.case.draft else ""
        return f"{self.policy}, {self.source}, mtp {self.mtp}{draft} on {self.case.ranks} {self.case.parallel}"


def shown(folders: Folders) -> list[Shown]:
    """All cases. Last what puts a bias beside norms: SGLang patches its norms for the rest of the process."""
    cases = [
        Shown(Case(str(folders.get(policy)), ranks, parallel), policy)
        for policy in ON_ALL for ranks, parallel in LAYOUTS
    ]  # fmt: skip
    cases += [Shown(Case(str(folders.get(policy))), policy) for policy in ON_ONE]
    for policy, source in OTHER_SOURCES:
        cases.append(Shown(Case(str(folders.get(policy, source))), policy, source))
    for policy, mtp in DRAFTS:
        folder = str(folders.get(policy, mtp=mtp))
        cases.append(Shown(Case(folder), policy, mtp=mtp))
        for ranks, parallel in DRAFT_LAYOUTS:
            case = Case(folder, ranks, parallel, draft=True, quantized=mtp == "quant")
            cases.append(Shown(case, policy, mtp=mtp))
    shifted = str(folders.get("shifted"))
    return [*cases, Shown(Case(shifted), "shifted"), Shown(Case(shifted, 4, "ep"), "shifted")]


def refused_by_contract(shown: Shown) -> Finding | None:
    """What our contract says before any weight is read."""
    program = load_program(Path(shown.case.folder) / GRAPH)
    ep = shown.case.ranks if shown.case.parallel == "ep" else 1
    asked = [linear for linear in linears(program) if (linear.kind is Kind.MTP) == shown.case.draft]
    return refusal(check(load_contract(Target.SGLANG_NPU), asked, shown.case.ranks, None, ep))


def outcomes(release: str, cases: Iterable[Shown], found: Iterable[dict[str, Any]]) -> list[Outcome]:
    """Rows of the matrix: the model of every shipped policy and of two-level experts, from a bfloat16 source."""
    return [
        Outcome(
            engine="SGLang", release=release, policy=case.policy, ranks=case.case.ranks, parallel=case.case.parallel,
            verdict=verdict(finding), words=_words(finding),
        )
        for case, finding in zip(cases, found, strict=True)
        if case.source == "bf16" and case.mtp == "none" and case.policy not in {*OWN_POLICIES} - {TWO_LEVEL}
    ]  # fmt: skip


def verdict(finding: dict[str, Any]) -> Verdict:
    """What became of a folder."""
    if finding["stopped"]:
        return Verdict.REFUSED
    return Verdict.WRONG if finding["wrong"] else Verdict.EQUAL


def serves(finding: dict[str, Any]) -> bool:
    """Whether the release serves the graph's numbers."""
    return verdict(finding) is Verdict.EQUAL


def _words(finding: dict[str, Any]) -> str:
    if finding["stopped"]:
        return str(finding["stopped"])
    if not finding["wrong"]:
        return f"{finding['compared']} compared, at most {finding['worst']:.2f} of the bound"
    skipped = f"; skipped {finding['skipped'][0]} and {len(finding['skipped']) - 1} more" if finding["skipped"] else ""
    return f"{finding['wrong'][0]}{skipped}"
