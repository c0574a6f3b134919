"""Layer policies: typed YAML, ordered rules, the first that matches a module decides its scheme."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxquant.errors import FxquantError
from fxquant.kinds import Kind
from fxquant.rotation import Rotate
from fxquant.schemes import Scheme, WeightAlgorithm
from fxquant.smooth_rule import PATTERN, NormBias, PairKind, SmoothRule

LEAVE_OUT: Literal["LEAVE_OUT"] = "LEAVE_OUT"
"""Not a scheme: the tensors of the selected modules are left out of the output."""
PERCENTILE = 99.99
"""Of a policy that says `activation_statistic: percentile` and no more."""
GROUP_SIZES = (0, 32, 64, 128, 256)


class ActivationStatistic(StrEnum):
    """How the inputs that calibration saw become one range.

    MIN_MAX     smallest minimum and largest maximum, scale formed in float32
    BATCH_MEAN  mean minimum and mean maximum over batches, everything in the model's dtype
    PERCENTILE  the values that `percentile` per cent of all values do not pass, on either side
    HISTOGRAM   the range with the least mean squared error of its int8, over a histogram
    """

    MIN_MAX = "min_max"
    BATCH_MEAN = "batch_mean"
    PERCENTILE = "percentile"
    HISTOGRAM = "histogram"


class UnseenExperts(StrEnum):
    """What GPTQ does for an expert that no calibration token chose: stop, take all tokens, or least squares instead."""

    ERROR = "error"
    ALL_TOKENS = "all_tokens"
    LEAST_SQUARES = "least_squares"


class MtpMode(StrEnum):
    """What a user asks of multi-token prediction layers: absent, as in the checkpoint, or in dynamic int8."""

    NONE = "none"
    FLOAT = "float"
    QUANT = "quant"


class CalibrationWeights(StrEnum):
    """Which weights the calibration forward runs on: the checkpoint's, or those rounded as the recipes round them."""

    FLOAT = "float"
    ROUNDED = "rounded"


class Rule(BaseModel):
    """`kind` and `path` (a shell pattern on the module path) select; both must hold when both are given."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: tuple[Kind, ...] = ()
    path: str | None = None
    scheme: Scheme | Literal["LEAVE_OUT"]
    group_size: int = 0
    algorithm: WeightAlgorithm = WeightAlgorithm.MIN_MAX
    optional: bool = False
    why: str = ""

    @model_validator(mode="before")
    @classmethod
    def _accept_one_kind(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("kind"), str):
            return {**data, "kind": [data["kind"]]}
        return data

    @model_validator(mode="after")
    def _check(self) -> "Rule":
        if not self.kind and self.path is None:
            raise ValueError("a rule needs a kind or a path")
        if self.path is not None and not re.fullmatch(PATTERN, self.path, re.ASCII):
            raise ValueError(f"path {self.path!r} is not a shell pattern of a module path")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size {self.group_size} is none of {GROUP_SIZES}")
        if self.group_size and self.scheme is not Scheme.W4A8_DYNAMIC:
            raise ValueError(f"group_size belongs to W4A8_DYNAMIC, not to {self.scheme}")
        if self.algorithm is not WeightAlgorithm.MIN_MAX and self.scheme in (Scheme.FLOAT, LEAVE_OUT):
            raise ValueError(f"algorithm {self.algorithm} chooses integers, and {self.scheme} has none")
        if self.algorithm is not WeightAlgorithm.MIN_MAX and Kind.MTP in self.kind:
            raise ValueError(f"algorithm {self.algorithm}: mtp layers are rounded by {WeightAlgorithm.MIN_MAX}")
        return self

    def selects(self, module: str, kind: Kind) -> bool:
        """Whether the rule's patterns hold for a module, whatever comes before it in the list."""
        return (not self.kind or kind in self.kind) and (self.path is None or fnmatchcase(module, self.path))

    def __str__(self) -> str:
        where = [", ".join(self.kind)] if self.kind else []
        where += [self.path] if self.path is not None else []
        size = f" group_size {self.group_size}" if self.group_size else ""
        by = f" by {self.algorithm}" if self.algorithm is not WeightAlgorithm.MIN_MAX else ""
        return f"{' at '.join(where)} → {self.scheme}{size}{by}"


class PolicyFile(BaseModel):
    """The YAML document."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""
    extends: str | None = None
    activation_statistic: ActivationStatistic | None = None
    percentile: float | None = Field(default=None, gt=50, le=100)
    calibration_weights: CalibrationWeights | None = None
    smooth: list[SmoothRule] | None = None
    norm_bias: NormBias | None = None
    rotate: list[Rotate] | None = None
    unseen_experts: UnseenExperts | None = None
    rules: list[Rule] = Field(default_factory=list)


@dataclass(frozen=True)
class Policy:
    """A resolved policy: its own rules, then those of what it extends; of other keys its own, or else those."""

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

    @property
    def rules(self) -> tuple[Rule, ...]:
        return self.own + self.inherited

    def rule_for(self, module: str, kind: Kind, quantizable: bool) -> Rule | None:
        """The first rule for a module. Quantizing rules pass over modules that are not linear."""
        for rule in self.rules:
            if rule.selects(module, kind) and (quantizable or rule.scheme in (Scheme.FLOAT, LEAVE_OUT)):
                return rule
        return None

    def smooth_rule_for(self, pair: PairKind, readers: list[tuple[str, Kind]]) -> SmoothRule | None:
        """The first smoothing rule for a value that these modules read."""
        return next((rule for rule in self.smooth if rule.selects(pair, readers)), None)

    def check_smooth_rules(self, used: Iterable[SmoothRule]) -> None:
        """Raises FxquantError for a smoothing rule that decided nothing, unless it is `optional`."""
        used = set(used)
        for rule in self.smooth:
            if rule not in used and not rule.optional:
                fact = f"smoothing rule “{rule}” matches no pair that an earlier rule has not taken."
                raise FxquantError(f"policy {self.name}", fact, "Correct it, or mark it optional: true.")

    def with_mtp(self, mode: MtpMode) -> "Policy":
        """This policy with its rules for kind mtp replaced by what a user asks."""
        schemes: dict[MtpMode, Scheme | Literal["LEAVE_OUT"]] = {
            MtpMode.NONE: LEAVE_OUT,
            MtpMode.FLOAT: Scheme.FLOAT,
            MtpMode.QUANT: Scheme.W8A8_DYNAMIC,
        }
        why = f"--mtp {mode}"
        asked = Rule(kind=(Kind.MTP,), scheme=schemes[mode], optional=mode is MtpMode.NONE, why=why)
        own, inherited = ([rule for rule in rules if rule.kind != (Kind.MTP,)] for rules in (self.own, self.inherited))
        return replace(self, own=(asked, *own), inherited=tuple(inherited))

    def idle_rules(self, used: Iterable[Rule], modules: Iterable[tuple[str, Kind]]) -> list[Rule]:
        """Rules that decided nothing; raises FxquantError unless each is `optional` or inherited and overridden."""
        used, modules = set(used), list(modules)
        idle = [rule for rule in self.rules if rule not in used]
        for rule in idle:
            overridden = rule in self.inherited and any(rule.selects(*module) for module in modules)
            if not rule.optional and not overridden:
                fact = f"rule “{rule}” matches no module that an earlier rule has not taken."
                raise FxquantError(f"policy {self.name}", fact, "Correct it, or mark it optional: true.")
        return idle


def shipped_policies() -> list[str]:
    """Names of the policies that come with fxquant."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def load_policy(name: str) -> Policy:
    """A shipped policy by name, or the path of a YAML file. Raises FxquantError for unknown names and bad files."""
    return _load(name, ())


def _load(name: str, ancestors: tuple[str, ...]) -> Policy:
    if name in ancestors:
        raise FxquantError(f"policy {name}", f"extends itself: {' → '.join((*ancestors, name))}.", "Break the circle.")
    text, place = _read(name)
    document = _parse(text, place)
    parent = _load(_beside(document.extends, name), (*ancestors, name)) if document.extends else None
    statistic = document.activation_statistic or (parent and parent.activation_statistic) or ActivationStatistic.MIN_MAX
    weights = document.calibration_weights or (parent and parent.calibration_weights) or CalibrationWeights.FLOAT
    smooth = tuple(document.smooth) if document.smooth is not None else parent.smooth if parent else ()
    percentile = document.percentile or (parent.percentile if parent else PERCENTILE)
    unseen = document.unseen_experts or (parent.unseen_experts if parent else UnseenExperts.ERROR)
    norm_bias = document.norm_bias or (parent.norm_bias if parent else "shifted")
    rotate = tuple(document.rotate) if document.rotate is not None else parent.rotate if parent else ()
    title = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    own, inherited = tuple(document.rules), parent.rules if parent else ()
    sizes = {rule.group_size for rule in own if rule.scheme is Scheme.W4A8_DYNAMIC}
    if len(sizes) > 1:
        raise FxquantError(place, f"group sizes {sorted(sizes)}.", "A weight file has one group_size: choose one.")
    return Policy(
        title, document.description, statistic, weights, own, inherited, smooth, norm_bias, percentile, unseen, rotate
    )


def _beside(extends: str, name: str) -> str:
    """A policy file named by `extends` is relative to the file that names it."""
    return str(Path(name).parent / extends) if extends.endswith((".yaml", ".yml")) else extends


def _folder() -> Any:
    return resources.files("fxquant") / "policies"


def _read(name: str) -> tuple[str, str]:
    if name in shipped_policies():
        return (_folder() / f"{name}.yaml").read_text(encoding="utf-8"), f"policy {name}"
    path = Path(name)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        known = ", ".join(shipped_policies())
        raise FxquantError(f"policy {name}", "unknown.", f"Name a YAML file or one of: {known}.")
    return path.read_text(encoding="utf-8"), str(path)


def _parse(text: str, place: str) -> PolicyFile:
    try:
        document = yaml.safe_load(text)
        return PolicyFile.model_validate(document if document is not None else {})
    except yaml.YAMLError as error:
        raise FxquantError(place, f"not valid YAML: {' '.join(str(error).split())}.", "See docs/policies.md.") from None
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc'])) or 'document'}: {e['msg']}" for e in error.errors()[:5]]
        raise FxquantError(place, "; ".join(lines) + ".", "See docs/policies.md for the keys.") from None
