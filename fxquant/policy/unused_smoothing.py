"""Why a smoothing rule of a policy decides nothing: which of the usual mistakes it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fxquant.policy.kinds import Kind
from fxquant.policy.smooth_rules import PairKind, SmoothRule
from fxquant.policy.unused_rules import OPTIONAL, Decided, quoted, some, why_no_path

Reader = tuple[str, Kind]


@dataclass(frozen=True)
class SeenValue:
    """A value that a pair might have smoothed.

    readers  modules whose weights it is multiplied by, and those of them that are quantized
    outcome  the rule that decided it, None where none did, or why it is no pair
    """

    made_by: PairKind
    readers: tuple[Reader, ...]
    quantized: tuple[Reader, ...]
    outcome: SmoothRule | str | None


def why_idle_smoothing(rule: SmoothRule, values: Sequence[SeenValue], modules: Sequence[Decided]) -> tuple[str, str]:
    """Why `rule`, which decided none of `values`, did not; and the way out. `modules` are all of the model."""
    at_path = [module for module in modules if rule.path is None or fnmatchcase(module.path, rule.path)]
    if not at_path:
        return why_no_path(rule.path or "*", modules)
    selected = [module for module in at_path if not rule.kind or module.kind in rule.kind]
    if not selected:
        kinds = ", ".join(sorted({module.kind.value for module in at_path}))
        fact = f"matches no pair: its path and kind together select nothing, {some(at_path)} being {kinds}."
        return fact, OPTIONAL
    any_pair = _of_any_pair(rule)
    readers = [one for one in values if any_pair.selects(one.made_by, list(one.readers))]
    if not readers:
        fact = f"matches no pair: no value that a norm or an attention makes is what {some(selected)} multiplies."
        return fact, f"Rules select by what reads a value. {OPTIONAL}"
    of_kind = [one for one in readers if rule.pair is None or one.made_by is rule.pair]
    if not of_kind:
        fact = f"matches no pair: a {readers[0].made_by} makes what {readers[0].readers[0][0]} reads, no {rule.pair}."
        return fact, f"Say pair: {readers[0].made_by}, or leave it out."
    taken = [one.outcome for one in of_kind if isinstance(one.outcome, SmoothRule)]
    if taken and any(rule.selects(one.made_by, list(one.quantized)) for one in of_kind):
        fact = f"matches no pair that earlier rules have not taken: {quoted(dict.fromkeys(taken))}."
        return fact, "Put it before them, delete it, or mark it optional: true."
    reason = next((one.outcome for one in of_kind if isinstance(one.outcome, str)), "what it names stays in float")
    name = next(path for path, kind in of_kind[0].readers if any_pair.selects(of_kind[0].made_by, [(path, kind)]))
    return f"matches no pair: of what {name} reads, {reason}.", OPTIONAL


def _of_any_pair(rule: SmoothRule) -> SmoothRule:
    """`rule` for values of either making."""
    return rule.model_copy(update={"pair": None})
