"""YAML from untrusted files: one bounded document of text, lists and mappings, each value with its line.

YAML's implicit types are off: a plain `no`, `64` or `2024-01-01` is text, and the reader of a key decides its type.
Only an empty value, `~` and `null` are None. Aliases and `<<` are followed; tags are refused.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from fxquant.errors import FxquantError
from fxquant.inputs.limits import NESTING, POLICY_VALUES
from fxquant.inputs.validation import cut

NOTHING = ("", "~", "null", "Null", "NULL")
TOKEN = re.compile(r"'?<([a-z ]+)>'?")


@dataclass(frozen=True)
class Located:
    """A value and its location.

    line      1-based; the line of the key for a value in a mapping
    children  by key or index
    size      number of values in it; an alias counts in full each time
    depth     nesting levels
    """

    value: Any
    line: int
    children: Mapping[str | int, "Located"] = field(default_factory=dict)
    size: int = 1
    depth: int = 1

    def line_of(self, location: Sequence[str | int]) -> int:
        """The line of the value at `location`, or of its deepest existing ancestor."""
        located = self
        for part in location:
            located = located.children.get(part, located)
        return located.line


class _RefusedError(Exception):
    def __init__(self, line: int, fact: str) -> None:
        self.line, self.fact = line, fact
        super().__init__(fact)


def parse_yaml(text: str, place: str, remedy: str) -> Located:
    """The single document of `text`; its value is None if the text is empty. Errors name `place` and the line.

    Raises FxquantError for invalid YAML, tags, duplicate keys, keys that are not text, more than `NESTING` levels and
    more than `POLICY_VALUES` values.
    """
    try:
        return _Parser(text).document()
    except _RefusedError as error:
        raise FxquantError(f"{place}:{error.line}", f"{error.fact}.", remedy) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise FxquantError(f"{place}:{line}", f"character {chr(error.character)!a} is not allowed.", remedy) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise FxquantError(f"{place}:{line}", f"not valid YAML: {_problem(error)}.", remedy) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # bad numbers in directives and escapes
        raise FxquantError(place, f"not valid YAML: {cut(str(error), 120)}.", remedy) from None


def _problem(error: yaml.MarkedYAMLError) -> str:
    problem = str(error.problem or error.context)
    if r"'\t'" in problem:
        return "a tab where only spaces are allowed"
    if problem == "mapping values are not allowed here":
        return "a colon inside a value; text that contains “: ” needs quotes"
    return cut(TOKEN.sub(r"\1", problem), 120)


class _Parser:
    def __init__(self, text: str) -> None:
        self._events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self._anchors: dict[str, Located | None] = {}

    def document(self) -> Located:
        root: Located | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise _RefusedError(_line(event), "a second document begins, but a policy is a single document")
                root = self._node(next(self._events), 1)
        return root or Located(None, 1)

    def _node(self, event: Any, depth: int) -> Located:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            located = self._aliased(event, line)
        else:
            if event.tag is not None:
                tag = cut(event.tag.replace("tag:yaml.org,2002:", "!!"), 40)
                raise _RefusedError(line, f"tag {tag}: tags are not supported")
            if depth > NESTING:
                raise _RefusedError(line, f"nested more than {NESTING} levels deep")
            if event.anchor is not None:
                self._anchors[event.anchor] = None  # until its node is complete: an alias inside it is a cycle
            located = self._value(event, depth, line)
            if event.anchor is not None:
                self._anchors[event.anchor] = located
        if depth + located.depth - 1 > NESTING:  # an alias brings its own levels
            raise _RefusedError(line, f"nested more than {NESTING} levels deep")
        if located.size > POLICY_VALUES:
            raise _RefusedError(line, f"more than {POLICY_VALUES:,} values, aliases expanded")
        return located

    def _aliased(self, event: Any, line: int) -> Located:
        anchored = self._anchors.get(event.anchor)
        if anchored is None:
            what = "refers to itself" if event.anchor in self._anchors else "has no anchor"
            raise _RefusedError(line, f"alias *{cut(event.anchor, 40)} {what}")
        return replace(anchored, line=line)

    def _value(self, event: Any, depth: int, line: int) -> Located:
        if isinstance(event, yaml.SequenceStartEvent):
            return _located(line, dict(enumerate(self._items(depth))), lambda items: list(items.values()))
        if isinstance(event, yaml.MappingStartEvent):
            return _located(line, self._entries(depth), dict)
        if not event.value.isascii():
            _check_text(event.value, line)
        return Located(None if event.style is None and event.value in NOTHING else event.value, line)

    def _items(self, depth: int) -> Iterator[Located]:
        size = 0
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            item = self._node(event, depth + 1)
            size = _bounded(size + item.size, item.line)
            yield item

    def _entries(self, depth: int) -> dict[str | int, Located]:
        own: dict[str | int, Located] = {}
        merged: dict[str | int, Located] = {}
        size = 0
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key, line = self._key(event), _line(event)
            value = replace(self._node(next(self._events), depth + 1), line=line)
            size = _bounded(size + value.size, line)
            if key == "<<" and event.style is None:
                merged |= {name: entry for name, entry in _merged(value).items() if name not in merged}
            elif key in own:
                raise _RefusedError(line, f"duplicate key {cut(key, 40)}, first on line {own[key].line}")
            else:
                own[key] = value
        return merged | own

    def _key(self, event: Any) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise _RefusedError(_line(event), "a key that is not text")
        key = self._node(event, 1).value
        return event.value if key is None else key


def _merged(value: Located) -> dict[str | int, Located]:
    """The entries that `<<: value` merges: a mapping, or a list of mappings where earlier ones win."""
    mappings = list(value.children.values()) if isinstance(value.value, list) else [value]
    entries: dict[str | int, Located] = {}
    for mapping in mappings:
        if not isinstance(mapping.value, dict):
            raise _RefusedError(value.line, "<< merges mappings, and this is not a mapping")
        entries |= {key: entry for key, entry in mapping.children.items() if key not in entries}
    return entries


def _located(line: int, children: dict[str | int, Located], constructor: Any) -> Located:
    size = 1 + sum(child.size for child in children.values())
    depth = 1 + max((child.depth for child in children.values()), default=0)
    return Located(constructor({key: child.value for key, child in children.items()}), line, children, size, depth)


def _bounded(size: int, line: int) -> int:
    if size > POLICY_VALUES:
        raise _RefusedError(line, f"more than {POLICY_VALUES:,} values, aliases expanded")
    return size


def _check_text(text: str, line: int) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _RefusedError(line, f"a lone surrogate: {text[error.start]!a}") from None


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1
