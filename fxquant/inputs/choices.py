"""Choices: an option whose values are the members of an enum."""

import difflib
from enum import StrEnum
from typing import TypeVar

from fxquant.errors import FxquantError

Choice = TypeVar("Choice", bound=StrEnum)


def choice(option: str, value: object, choices: type[Choice]) -> Choice:
    """The member of `choices` that `value` is or names. Raises FxquantError with the nearest name and all of them."""
    names = [str(choice) for choice in choices]
    if isinstance(value, str) and value in names:
        return choices(value)
    near = difflib.get_close_matches(str(value), names, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise FxquantError(f"{option} {value}", "unknown.", f"{hint}Choose one of: {', '.join(names)}.")
