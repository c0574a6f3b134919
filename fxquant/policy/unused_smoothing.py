"""Unused smoothing rules: why a rule decides nothing, by common mistake."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fxquant.policy.kinds import Kind
from fxquant.policy.smooth_rules import PairKind, SmoothRule
from fxquant.policy.unused_rules import OPTIONAL, Decided, quoted, some, why_no_path

Consumer = tuple[str, Kind]


@dataclass(frozen=True)
class SeenValue:
    """A value that could be smoothed.

    consumers  modules whose weights multiply it; `quantized` those that are quantized
    outcome    the rule that decided it, None if no rule did, or the reason why it is not a pair
    """

    made_by: PairKind
    consumers: tuple[Consumer, ...]
    quantized: tuple[Consumer, ...]
    outcome: SmoothRule | str | None


def why_unused_smoothing(rule: SmoothRule, values: Sequence[SeenValue], modules: Sequence[Decided]) -> tuple[str, str]:
    """The reason why `rule` decided none of `values`, and the remedy. `modules` are all modules of the model."""
    at_path = [module for module in modules if rule.path is None or fnmatchcase(module.path, rule.path)]
    if not at_path:
        return why_no_path(rule.path or "*", modules)
    selected = [module for module in at_path if not rule.kind or module.kind in rule.kind]
    if not selected:
        kinds = ", ".join(sorted({module.kind.value for module in at_path}))
        fact = f"matches no pair: path and kind exclude each other, as {some(at_path)} has kind {kinds}."
        return fact, OPTIONAL
    any_pair = _of_any_pair(rule)
    pairs = [value for value in values if any_pair.selects(value.made_by, list(value.consumers))]
    if not pairs:
        fact = f"matches no pair: {some(selected)} reads no output of a norm, an attention or a swiglu."
        return fact, f"Smoothing rules select the modules that read a value. {OPTIONAL}"
    of_kind = [value for value in pairs if rule.pair is None or value.made_by is rule.pair]
    if not of_kind:
        fact = f"matches no pair: {pairs[0].consumers[0][0]} reads from a {pairs[0].made_by}, not from a {rule.pair}."
        return fact, f"Use pair: {pairs[0].made_by}, or omit it."
    taken = [value.outcome for value in of_kind if isinstance(value.outcome, SmoothRule)]
    if taken and any(rule.selects(value.made_by, list(value.quantized)) for value in of_kind):
        fact = f"matches only pairs that earlier rules match first: {quoted(dict.fromkeys(taken))}."
        return fact, "Move it before them, delete it, or mark it optional: true."
    reason = next(
        (value.outcome for value in of_kind if isinstance(value.outcome, str)), "the selected ones stay in float"
    )
    name = next(path for path, kind in of_kind[0].consumers if any_pair.selects(of_kind[0].made_by, [(path, kind)]))
    return f"matches no pair: for the input of {name}, {reason}.", OPTIONAL


def _of_any_pair(rule: SmoothRule) -> SmoothRule:
    """`rule` without its condition on the producer."""
    return rule.model_copy(update={"pair": None})
