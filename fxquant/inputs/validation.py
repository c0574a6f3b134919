"""Pydantic validation errors, reworded for the document's author: key, value, expected value."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

Location = tuple[str | int, ...]
PLAIN = re.compile(r"[\w.*?\[\]!+/\-]+")
TYPE_NAMES = {
    "bool": "true or false",
    "int": "an integer",
    "float": "a number",
    "decimal": "a number",
    "finite": "a finite number",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
    "iterable": "a list",
    "dict": "a mapping",
    "model": "a mapping",
    "mapping": "a mapping",
    "dataclass": "a mapping",
}
"""First word of pydantic's error type → expected value."""
BOUNDS = {
    "greater_than": ("gt", "is not greater than"),
    "greater_than_equal": ("ge", "is less than"),
    "less_than": ("lt", "is not less than"),
    "less_than_equal": ("le", "is more than"),
    "multiple_of": ("multiple_of", "is not a multiple of"),
}
"""Pydantic's error type → key of the bound in its context, and how the value relates to it."""


@dataclass(frozen=True)
class WrongValue:
    """One fault. `fact` names key and value; `nearest` is the most similar valid word, or ""."""

    location: Location
    fact: str
    nearest: str = ""

    @property
    def hint(self) -> str:
        """`nearest` as a question, or ""."""
        return f"Did you mean {self.nearest}?" if self.nearest else ""


def cut(text: str, length: int) -> str:
    """`text` on one line, unprintable characters escaped, cut to `length` characters."""
    text = " ".join(text[: length + 1].split())
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= length else f"{text[:length]}…"


def shown(value: Any, quoted: bool = True) -> str:
    """A user's value, shortened to fit a line; text is in quotes if `quoted` or not a plain word."""
    if isinstance(value, str):
        short = cut(value, 60)
        return short if not quoted and PLAIN.fullmatch(short) else f"'{short}'"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return cut(str(value) if isinstance(value, float) or abs(value) < 10**60 else "an integer of many digits", 60)
    if isinstance(value, dict):
        return "a mapping"
    return "a list" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def nearest(word: str, words: Sequence[str], similarity: float = 0.6) -> str:
    """The most similar of `words`, ignoring case; "" if none is similar."""
    by_folded = {candidate.casefold(): candidate for candidate in reversed(words)}
    matches = get_close_matches(word[:200].casefold(), list(by_folded), 1, similarity)
    return by_folded[matches[0]] if matches else ""


def wrong_values(
    error: ValidationError, model: type[BaseModel], document: Any, quoted: bool = True
) -> list[WrongValue]:
    """Every fault of `document` under `model`, one per location; missing keys come last.

    `quoted`: show text in quotes, for documents where text and numbers differ.
    """
    values: dict[Location, WrongValue] = {}
    choices: dict[Location, list[str]] = {}
    for fault in error.errors(include_url=False)[:MOST]:
        location = _in_document(fault["loc"], document, model, fault["type"] in ("missing", "extra_forbidden"))
        if "expected" in fault.get("ctx", {}) and fault["type"] in ("enum", "literal_error"):
            choices.setdefault(location, []).extend(_expected(fault["ctx"]["expected"], quoted))
            values[location] = _choice(location, fault["input"], choices[location], quoted)
        elif location not in choices:
            values.setdefault(location, _wrong(location, dict(fault), model, quoted))
    return sorted(values.values(), key=lambda value: (value.fact.endswith(MISSING), len(value.location) == 0))


MISSING = "required, and missing"
MOST = 1000
"""Faults examined: the first of them are enough to report a file of a million wrong lines."""


def validation_fact(error: ValidationError, model: type[BaseModel], document: Any, most: int = 3) -> str:
    """The first `most` faults of `document` under `model`, on one line."""
    faults = wrong_values(error, model, document)
    facts = [f"{fault.fact}.{' ' * bool(fault.hint)}{fault.hint}" for fault in faults[:most]]
    return " ".join(facts) + (f" And {len(faults) - most} more." if len(faults) > most else "")


def _wrong(location: Location, fault: dict[str, Any], model: type[BaseModel], quoted: bool) -> WrongValue:
    key, kind, context = _key(location), fault["type"], fault.get("ctx", {})
    value = shown(fault["input"], quoted)
    if kind == "missing":
        return WrongValue(location, f"{key}{MISSING}")
    if kind == "extra_forbidden":
        keys = _keys_at(model, location[:-1])
        return WrongValue(location, f"{key}unknown key", nearest(str(location[-1]), keys))
    if kind == "value_error":
        return WrongValue(location, f"{key}{cut(str(context.get('error', 'does not fit')), 400)}")
    if kind in BOUNDS:
        name, relation = BOUNDS[kind]
        bound = context[name]
        return WrongValue(location, f"{key}{value} {relation} {bound:{',' if abs(bound) >= 10000 else ''}}")
    if kind == "int_parsing_size":
        return WrongValue(location, f"{key}{value} has too many digits")
    type_name = TYPE_NAMES.get(kind.split("_")[0])
    if type_name is None:
        return WrongValue(location, f"{key}{value} does not fit")
    return WrongValue(location, f"{key}{'empty' if fault['input'] is None else value}, not {type_name}")


def _choice(location: Location, value: Any, choices: Sequence[str], quoted: bool) -> WrongValue:
    is_none = "is not one of" if len(choices) > 1 else "is not"
    fact = f"{_key(location)}{shown(value, quoted)} {is_none} {', '.join(choices)}"
    near = nearest(value, [choice.strip("'") for choice in choices]) if isinstance(value, str) else ""
    return WrongValue(location, fact, near if len(choices) > 1 else "")


def _expected(text: str, quoted: bool) -> list[str]:
    """pydantic's list of choices, `'a', 'b' or 1`."""
    words = [word for word in re.split(r", | or ", text) if word]
    return [{"True": "true", "False": "false"}.get(word, word if quoted else word.strip("'")) for word in words]


def _key(location: Location) -> str:
    return f"{cut('.'.join(map(str, location)), 80)}: " if location else ""


def _in_document(location: Sequence[str | int], document: Any, model: type[BaseModel], absent: bool) -> Location:
    """`location` without the names that pydantic adds for union members; `absent`: its last part may be missing."""
    parts: list[str | int] = []
    for part in location:
        kind = {int: list, str: dict}[type(part)]
        if isinstance(document, kind) and (part in document if kind is dict else int(part) < len(document)):
            document = document[part]
        elif part in _keys_at(model, tuple(parts)):  # a default, or a key read under an alias
            document = None
        else:
            continue
        parts.append(part)
    if absent and parts != list(location) and location:
        parts.append(location[-1])
    return tuple(parts)


def _keys_at(model: type[BaseModel], location: Location) -> list[str]:
    """The keys that the document may have at `location`."""
    at: type[BaseModel] | None = model
    for part in location:
        if isinstance(part, str) and at is not None:
            fields = at.model_fields
            at = _model_in(fields[part].annotation) if part in fields else None
    return sorted(at.model_fields) if at else []


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    inner: Callable[[Any], tuple[Any, ...]] = get_args
    return next((model for argument in inner(annotation) if (model := _model_in(argument)) is not None), None)
