"""Difference: how a class differs from the published version that it was made of, on a few lines."""

import linecache
from collections.abc import Iterator
from difflib import SequenceMatcher
from pathlib import Path

from torch import nn

from fxquant.frontend.recognition.published import Version, changed, read, versions
from fxquant.frontend.recognition.source_code import Code, Statement

LINES = 8
"""Statements that are shown."""
ALIKE = 0.5
"""Part of the statements that a class shares with a published one of another name, to be taken for made of it."""


def kin(module: nn.Module, family: str) -> Version | None:
    """The published version that the class of `module` was made of: of the same name or base class and most alike, or
    most alike whatever its name; None if it is like none."""
    code = read(type(module))
    names = [cls.__name__ for cls in type(module).__mro__]
    candidates = [each for each in versions() if each.family == family]
    named = [each for each in candidates if each.name in names]
    likeness = {each: _alike(code, each) if code else 0.0 for each in named or candidates}
    best = max(likeness, key=lambda each: likeness[each], default=None)
    return best if best is not None and (named or likeness[best] >= ALIKE) else None


def _alike(code: Code, version: Version) -> float:
    return SequenceMatcher(None, version.statements, [each.digest for each in code.statements], False).ratio()


def difference(module: nn.Module, version: Version) -> str:
    """What differs, one line each, indented; the first line of user code that differs comes first."""
    attached = changed(module)
    if attached is not None:
        return f"    it has {attached}"
    code = read(type(module))
    if code is None:
        return "    its source cannot be read"
    lines = list(_lines(code.statements, version))
    if not lines:
        return "    its statements are the same, on other variables or with other global values"
    more = [f"    … and {len(lines) - LINES} more"] if len(lines) > LINES else []
    return "\n".join([*lines[:LINES], *more])


def _lines(own: tuple[Statement, ...], version: Version) -> Iterator[str]:
    matcher = SequenceMatcher(None, version.statements, [each.digest for each in own], autojunk=False)
    for tag, first, last, start, stop in matcher.get_opcodes():
        if tag == "equal":
            continue
        for statement in own[start:stop]:
            yield f"    {Path(statement.file).name}:{statement.line} + {_written(statement)}"
        if last > first and start == stop:
            place = own[min(start, len(own) - 1)]
            count = f"{last - first} statement" + "s" * (last - first > 1)
            yield f"    {Path(place.file).name}:{place.line} - {count} of the published version"


def _written(statement: Statement) -> str:
    text = linecache.getline(statement.file, statement.line).strip() or statement.text
    return text if len(text) <= 80 else text[:79] + "…"
