"""Unused policy rules: why a rule decides nothing, by common mistake, with similar paths."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from fxquant.inputs.validation import cut
from fxquant.policy.kinds import Kind
from fxquant.policy.rule import Rule

ANYTHING = "*"
OPTIONAL = "Correct it, or mark it optional: true."
SHOWN = 4


@dataclass(frozen=True)
class Decided:
    """A module of the model as seen by rules.

    linear   whether a quantizing rule may decide it
    rule     the rule that decided it
    members  checkpoint weights that form one module in the graph: the experts of a layer
    """

    path: str
    kind: Kind
    linear: bool
    rule: Rule
    members: tuple[str, ...] = ()


def why_unused(rule: Rule, modules: Sequence[Decided]) -> tuple[str, str]:
    """The reason why `rule` decided none of `modules`, and the remedy."""
    at_path = [module for module in modules if rule.path is None or fnmatchcase(module.path, rule.path)]
    if not at_path:
        return why_no_path(rule.path or ANYTHING, modules)
    selected = [module for module in at_path if rule.selects(module.path, module.kind)]
    if not selected:
        return _other_kind(rule, at_path, modules)
    quantizing = rule.quantizes
    if quantizing and not any(module.linear for module in selected):
        kinds = ", ".join(sorted({module.kind.value for module in selected}))
        fact = f"selects {some(selected)} ({kinds}), but {rule.scheme} is for linears only."
        return fact, "Select linears, or use scheme: FLOAT."
    fitting = [module for module in selected if module.linear or not quantizing]
    takers = dict.fromkeys(module.rule for module in fitting)
    fact = f"selects {some(fitting)}, but earlier rules match first: {quoted(takers)}."
    return fact, "Move it before them, delete it, or mark it optional: true."


def why_no_path(pattern: str, modules: Sequence[Decided]) -> tuple[str, str]:
    """The reason why a path matches none of `modules`, and the remedy."""
    experts = next((module for module in modules if _names_one_of(module.members, pattern)), None)
    if experts is not None:
        fact = "names single experts; the experts of a layer are one module and share one rule."
        return fact, f"Write path: {experts.path}, or {_parent(experts.path)}.* for all projections."
    inside = [module for module in modules if any(fnmatchcase(above, pattern) for above in _above(module.path))]
    if inside:
        fact = f"matches a parent of {inside[0].path}, not the modules in it."
        return fact, f"Write path: {pattern}.*"
    if any(fnmatchcase(f"{module.path}.{tensor}", pattern) for module in modules for tensor in ("weight", "bias")):
        return "matches tensors; a rule must match modules.", f"Write path: {pattern.rpartition('.')[0]}"
    ended = next((module for module in modules if fnmatchcase(module.path, f"*.{pattern}")), None)
    if ended is not None:
        fact = f"matches no whole path, only the end of {ended.path}."
        return fact, f"Write path: '*.{pattern}'"
    return _far(pattern, [module.path for module in modules])


def _names_one_of(members: Iterable[str], pattern: str) -> bool:
    """Whether `pattern` matches a single expert or a projection of one."""
    paths = (_parent(name) for name in members)
    return any(fnmatchcase(path, pattern) or fnmatchcase(_parent(path), pattern) for path in paths)


def _far(pattern: str, paths: list[str]) -> tuple[str, str]:
    near = list(dict.fromkeys(_near(pattern, paths)))[:SHOWN]
    if near:
        return "matches no path of the model.", f"Similar: {', '.join(near)}. {OPTIONAL}"
    matched, follows = _beginning(pattern, paths)
    if not matched:
        tops = _listed(sorted({path.split(".")[0] for path in paths}))
        return "matches no path of the model.", f"Paths begin with {tops}; fxquant show prints them. {OPTIONAL}"
    return f"matches no path of the model: {matched} is followed by {_listed(follows)}.", OPTIONAL


def _near(pattern: str, paths: list[str]) -> Iterator[str]:
    """Matching patterns with one part replaced by a similar one, then similar paths."""
    parts = pattern.split(".")
    known = sorted({part for path in paths for part in path.split(".") if not part.isdecimal()})
    for index, part in enumerate(parts):
        for other in get_close_matches(part, known, 3, 0.6) if not part.isdecimal() else ():
            changed = ".".join([*parts[:index], other, *parts[index + 1 :]])
            if any(fnmatchcase(path, changed) for path in paths):
                yield changed
    if not set(pattern) & set("*?["):
        yield from get_close_matches(pattern, paths, SHOWN, 0.85) if len(paths) < 5000 else ()


def _beginning(pattern: str, paths: list[str]) -> tuple[str, list[str]]:
    """The longest prefix of `pattern` that matches the beginning of paths, and the parts that follow it there."""
    parts = pattern.split(".")
    for end in range(len(parts) - 1, 0, -1):
        begin = ".".join(parts[:end])
        follows = list(
            dict.fromkeys(rest for path in paths for above, rest in _cuts(path) if fnmatchcase(above, begin))
        )
        if follows and begin.strip("*"):
            return begin, follows
    return "", []


def _other_kind(rule: Rule, at_path: Sequence[Decided], modules: Sequence[Decided]) -> tuple[str, str]:
    kinds = sorted({module.kind.value for module in at_path})
    if rule.path is not None:
        fact = f"its path matches {some(at_path)}, of kind {', '.join(kinds)}."
        return fact, "Correct the kind, or omit it."
    there = ", ".join(sorted({module.kind.value for module in modules}))
    return f"the model has no module of that kind; it has {there}.", OPTIONAL


def some(modules: Sequence[Decided]) -> str:
    """The first path, and the number of the others."""
    return modules[0].path + (f" and {len(modules) - 1:,} more" if len(modules) > 1 else "")


def quoted(rules: Iterable[object]) -> str:
    """The first few rules, in quotes."""
    names = [f"“{rule}”" for rule in rules]
    return ", ".join(names[:SHOWN]) + (" and others" if len(names) > SHOWN else "")


def _listed(parts: Sequence[str]) -> str:
    numbers = [part for part in parts if part.isdecimal()]
    words = [f"{numbers[0]} to {numbers[-1]}"] if len(numbers) > 2 else numbers
    words += [cut(part, 60) for part in parts if not part.isdecimal()]
    return ", ".join(words[:12]) + (", …" if len(words) > 12 else "")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _cuts(path: str) -> Iterator[tuple[str, str]]:
    """Every parent of `path`, with the part that follows it."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        yield ".".join(parts[:end]), parts[end]


def _above(path: str) -> Iterator[str]:
    return (above for above, _ in _cuts(path))
