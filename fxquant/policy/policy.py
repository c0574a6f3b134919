"""Policy: ordered rules; the first rule that matches a module decides its scheme."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Literal

from fxquant.errors import FxquantError
from fxquant.inputs.limits import POLICY_DEPTH
from fxquant.policy.kinds import Kind
from fxquant.policy.policy_file import (
    ActivationStatistic,
    CalibrationWeights,
    PolicyDocument,
    UnseenExperts,
    open_policy,
    shipped_policies,
)
from fxquant.policy.rule import AUTO, AUTO_WORD, LEAVE_OUT, Rule
from fxquant.policy.smooth_rules import NormBias, PairKind, SmoothRule
from fxquant.policy.unused_rules import Decided, why_unused
from fxquant.policy.unused_smoothing import SeenValue, why_unused_smoothing
from fxquant.schemes.schemes import Scheme
from fxquant.transforms.rotation import Rotate

__all__ = [
    "LEAVE_OUT", "ActivationStatistic", "CalibrationWeights", "MtpMode", "Policy", "Rule", "UnseenExperts",
    "load_policy", "shipped_policies",
]  # fmt: skip

PERCENTILE = 99.99
"""Default for `activation_statistic: percentile`."""


Modules = Callable[[], Sequence[Decided]]


class MtpMode(StrEnum):
    """Treatment of multi-token prediction layers: left out, as in the checkpoint, or in int8, static where the policy
    gives a static scheme to such linears of decoder layers."""

    NONE = "none"
    FLOAT = "float"
    QUANT = "quant"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A resolved policy: its own rules before the inherited ones; other keys are its own, else inherited.

    lines  location of each rule that comes from a file, as `path:line`
    """

    name: str
    description: str
    activation_statistic: ActivationStatistic
    calibration_weights: CalibrationWeights
    own: tuple[Rule, ...]
    inherited: tuple[Rule, ...] = ()
    smooth: tuple[SmoothRule, ...] = ()
    norm_bias: NormBias = "shifted"
    percentile: float = PERCENTILE
    unseen_experts: UnseenExperts = UnseenExperts.ERROR
    rotate: tuple[Rotate, ...] = ()
    lines: Mapping[Rule | SmoothRule, str] = field(default_factory=dict, compare=False)

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.own + self.inherited

    @property
    def unguarded(self) -> bool:
        """Whether it quantizes, and neither smooths nor rotates: large channels then take the range of all others."""
        return not self.smooth and not self.rotate and any(rule.quantizes for rule in self.rules)

    def rule_for(self, module: str, kind: Kind, quantizable: bool) -> Rule | None:
        """The first rule for a module. Quantizing rules skip modules that are not linear."""
        for rule in self.rules:
            if rule.selects(module, kind) and (quantizable or not rule.quantizes):
                return rule
        return None

    def smooth_rule_for(self, pair: PairKind, consumers: list[tuple[str, Kind]]) -> SmoothRule | None:
        """The first smoothing rule for a value that the modules `consumers` read."""
        return next((rule for rule in self.smooth if rule.selects(pair, consumers)), None)

    def check_smooth_rules(self, used: Iterable[SmoothRule], values: Sequence[SeenValue], modules: Modules) -> None:
        """Raises FxquantError for a smoothing rule that decided none of `values`, with the reason, unless the rule is
        `optional`. `modules` returns all modules of the model."""
        used = set(used)
        for rule in self.smooth:
            if rule not in used and not rule.optional:
                fact, way_out = why_unused_smoothing(rule, values, modules())
                raise FxquantError(self.place(rule), f"smoothing rule “{rule}” {fact}", way_out)

    def place(self, rule: Rule | SmoothRule) -> str:
        """The location of a rule, for errors."""
        return self.lines.get(rule, f"policy {self.name}")

    def with_mtp(self, mode: MtpMode, static: bool = False) -> "Policy":
        """This policy with its rules for kind mtp replaced by one for `mode`; `static`: whether other rules give static
        schemes to linears of these layers."""
        schemes: dict[MtpMode, Scheme | Literal["LEAVE_OUT"]] = {
            MtpMode.NONE: LEAVE_OUT,
            MtpMode.FLOAT: Scheme.FLOAT,
            MtpMode.QUANT: Scheme.W8A8 if static else Scheme.W8A8_DYNAMIC,
        }
        why = f"--mtp {mode}"
        asked = Rule(kind=(Kind.MTP,), scheme=schemes[mode], optional=mode is MtpMode.NONE, why=why)
        own, inherited = ([rule for rule in rules if rule.kind != (Kind.MTP,)] for rules in (self.own, self.inherited))
        return replace(self, own=(asked, *own), inherited=tuple(inherited))

    def unused_rules(self, used: Iterable[Rule], modules: Sequence[Decided]) -> list[Rule]:
        """Rules that decided none of `modules`. Raises FxquantError with the reason unless each is `optional`, or
        inherited and overridden."""
        used = set(used)
        idle = [rule for rule in self.rules if rule not in used]
        for rule in idle:
            overridden = rule in self.inherited and any(rule.selects(module.path, module.kind) for module in modules)
            if not rule.optional and not overridden:
                fact, way_out = why_unused(rule, modules)
                raise FxquantError(self.place(rule), f"rule “{rule}” {fact}", way_out)
        return idle


def load_policy(name: str) -> Policy:
    """Load a shipped policy by name or a YAML file by path. Raises FxquantError for unknown names and bad files."""
    chain = [open_policy(name, Path())]
    while (parent := chain[-1].parent()) is not None:
        names = [document.place for document in (*chain, parent)]
        if _file(parent) in map(_file, chain):
            fact = f"extends itself: {' → '.join(names)}."
            raise FxquantError(chain[-1].line("extends"), fact, "Remove one `extends` of the cycle.")
        if len(chain) == POLICY_DEPTH:
            fact = f"more than {POLICY_DEPTH} policies extend one another, starting at {chain[0].place}."
            raise FxquantError(chain[-1].line("extends"), fact, "Merge them into fewer files.")
        chain.append(parent)
    resolved: Policy | None = None
    for document in reversed(chain):
        resolved = _resolved(document, resolved)
    assert resolved is not None
    return resolved


def _file(document: PolicyDocument) -> Path | str:
    return document.path.resolve() if document.path else document.place  # resolved, links cannot hide a cycle


def _resolved(document: PolicyDocument, parent: Policy | None) -> Policy:
    says = document.says
    inherited = parent or Policy(
        name="",
        description="",
        activation_statistic=ActivationStatistic.MIN_MAX,
        calibration_weights=CalibrationWeights.FLOAT,
        own=(),
    )
    sizes = {rule.group_size for rule in says.rules if rule.grouped}
    if len(sizes) > 1:
        fact = f"has group sizes {', '.join(AUTO_WORD if size == AUTO else str(size) for size in sorted(sizes))}."
        raise FxquantError(document.line("rules"), fact, "A weight file has one group_size: choose one.")
    return Policy(
        name=document.path.stem if document.path else document.place.removeprefix("policy "),
        description=says.description,
        activation_statistic=says.activation_statistic or inherited.activation_statistic,
        calibration_weights=says.calibration_weights or inherited.calibration_weights,
        own=tuple(says.rules),
        inherited=inherited.rules,
        # not `or`: an empty list switches inherited smoothing off
        smooth=inherited.smooth if says.smooth is None else tuple(says.smooth),
        norm_bias=says.norm_bias or inherited.norm_bias,
        percentile=says.percentile or inherited.percentile,
        unseen_experts=says.unseen_experts or inherited.unseen_experts,
        rotate=inherited.rotate if says.rotate is None else tuple(says.rotate),
        lines={**inherited.lines, **dict(document.rule_lines())},
    )
