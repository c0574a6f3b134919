"""Policy files: resolving a name to a YAML file, and reading it with the line of every value."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_text
from fxquant.inputs.limits import POLICY_BYTES
from fxquant.inputs.validation import WrongValue, cut, nearest, wrong_values
from fxquant.inputs.yaml_file import Located, parse_yaml
from fxquant.policy.rule import Rule
from fxquant.policy.smooth_rules import NormBias, SmoothRule
from fxquant.transforms.rotation import Rotate

SUFFIXES = (".yaml", ".yml")
SEE = "See docs/policies.md for the keys."
SHOWN_FAULTS = 4


class ActivationStatistic(StrEnum):
    """How observed calibration inputs are reduced to one range.

    MIN_MAX     smallest minimum and largest maximum, scale computed in float32
    BATCH_MEAN  mean minimum and mean maximum over batches, all in the model's dtype
    PERCENTILE  the `percentile` of all values, on either side
    HISTOGRAM   the range with the least mean squared int8 error over a histogram
    """

    MIN_MAX = "min_max"
    BATCH_MEAN = "batch_mean"
    PERCENTILE = "percentile"
    HISTOGRAM = "histogram"


class UnseenExperts(StrEnum):
    """GPTQ for an expert that no calibration token chose: raise an error, use all tokens, or use least squares."""

    ERROR = "error"
    ALL_TOKENS = "all_tokens"
    LEAST_SQUARES = "least_squares"


class CalibrationWeights(StrEnum):
    """Weights of the calibration forward: the checkpoint's, or rounded by the recipes."""

    FLOAT = "float"
    ROUNDED = "rounded"


class PolicyFile(BaseModel):
    """The YAML document."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    description: str = ""
    extends: str | None = None
    activation_statistic: ActivationStatistic | None = None
    percentile: float | None = Field(default=None, gt=50, le=100, allow_inf_nan=False)
    calibration_weights: CalibrationWeights | None = None
    smooth: list[SmoothRule] | None = None
    norm_bias: NormBias | None = None
    rotate: list[Rotate] | None = None
    unseen_experts: UnseenExperts | None = None
    rules: list[Rule] = Field(default_factory=list)


@dataclass(frozen=True)
class PolicyDocument:
    """A parsed file. `place` is its path, or `policy <name>` for a shipped policy, whose `path` is None."""

    place: str
    path: Path | None
    says: PolicyFile
    root: Located

    def line(self, *location: str | int) -> str:
        """The place and line of the value at `location`; shipped policies have no lines."""
        return f"{self.place}:{self.root.line_of(location)}" if self.path else self.place

    def rule_lines(self) -> Iterator[tuple[Rule | SmoothRule, str]]:
        """Every rule with its location."""
        for index, rule in enumerate(self.says.rules):
            yield rule, self.line("rules", index)
        for index, smooth_rule in enumerate(self.says.smooth or ()):
            yield smooth_rule, self.line("smooth", index)

    def parent(self) -> "PolicyDocument | None":
        """The policy that it extends: a shipped one, or a file relative to this one."""
        name = self.says.extends
        if name is None:
            return None
        try:
            return open_policy(name, self.path.parent if self.path else Path())
        except _UnknownError as error:
            raise FxquantError(self.line("extends"), f"extends {error.place}: {error.fact}", error.remedy) from None


class _UnknownError(FxquantError):
    """No such policy."""


def shipped_policies() -> list[str]:
    """Names of the policies shipped with fxquant."""
    return sorted(Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".yaml"))


def is_file_name(name: str) -> bool:
    """Whether a name denotes a file rather than a shipped policy."""
    return name.endswith(SUFFIXES) or "/" in name


def open_policy(name: str, folder: Path) -> PolicyDocument:
    """Read and check the shipped policy or the YAML file (relative to `folder`) called `name`.

    Raises FxquantError for unknown names, and for any fault in the file with its line.
    """
    if not is_file_name(name):
        if name not in shipped_policies():
            raise _unknown(name, folder)
        text = (_folder() / f"{name}.yaml").read_text(encoding="utf-8")
        return _parsed(text, f"policy {name}", None)
    path = folder / name
    try:
        there = path.exists()
    except (OSError, ValueError):
        there = True  # reading it will raise the error
    if not there:
        raise _missing(name, path)
    if not name.endswith(SUFFIXES):
        raise FxquantError(path, "not a policy: its name does not end in .yaml.", "Rename it, or pass another file.")
    return _parsed(read_text(path, POLICY_BYTES, "Pass a YAML file, see docs/policies.md."), str(path), path)


def _folder() -> Any:
    return resources.files("fxquant.policy") / "shipped"


def _unknown(name: str, folder: Path) -> FxquantError:
    known = shipped_policies()
    place = f"policy {cut(name, 80)}"
    beside = next((f"{name}{suffix}" for suffix in SUFFIXES if name and _is_file(folder / f"{name}{suffix}")), "")
    near = beside or nearest(name, known)
    hint = f"Did you mean {near}? " if near else ""
    return _UnknownError(place, "unknown.", f"{hint}Pass a YAML file or one of: {', '.join(known)}.")


def _missing(name: str, path: Path) -> FxquantError:
    shipped = Path(name).stem
    if shipped in shipped_policies():
        way_out = f"To use the shipped policy of that name, drop folder and suffix: {shipped}."
    else:
        near = nearest(path.name, _beside(path))
        way_out = f"Did you mean {path.with_name(near)}?" if near else "Check the path, or name a shipped policy."
    return _UnknownError(cut(str(path), 300), "no such policy file.", way_out)


def _beside(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.parent.iterdir() if entry.name.endswith(SUFFIXES))[:1000]
    except OSError:
        return []


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _parsed(text: str, place: str, path: Path | None) -> PolicyDocument:
    root = parse_yaml(text, place, SEE)
    value = {} if root.value is None else root.value
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "text"
        raise FxquantError(f"{place}:{root.line}", f"the document is {kind}, not keys and values.", SEE)
    try:
        return PolicyDocument(place, path, PolicyFile.model_validate(value), root)
    except ValidationError as error:
        faults = wrong_values(error, PolicyFile, value, quoted=False)
        raise _refused(sorted(faults, key=lambda fault: root.line_of(fault.location)), root, place) from None


def _refused(faults: list[WrongValue], root: Located, place: str) -> FxquantError:
    """An error at the line of the first fault; some of the others follow with their lines."""
    first, *others = faults
    more = [f"Line {root.line_of(fault.location)}: {fault.fact}.{_hint(fault)}" for fault in others[: SHOWN_FAULTS - 1]]
    if len(others) >= SHOWN_FAULTS:
        more.append(f"And {len(others) - SHOWN_FAULTS + 1} more.")
    fact = " ".join([f"{first.fact}.{_hint(first)}", *more])
    return FxquantError(f"{place}:{root.line_of(first.location)}", fact, SEE)


def _hint(fault: WrongValue) -> str:
    return f" {fault.hint}" if fault.hint else ""
