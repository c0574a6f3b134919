"""Numbers in code: what the methods of a class may compare lengths and positions with."""

from collections.abc import Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from fxquant.frontend.recognition.source_code import TRUSTED, home_of

KNOWN = (*TRUSTED, "builtins")


def numbers_of(cls: type[Any]) -> set[int]:
    """Whole numbers in the methods of `cls` and in the functions of a user's files that they reach: written there,
    computed by the compiler, or held by the globals that they name."""
    attributes = [
        held for each in cls.__mro__ if each.__module__.split(".")[0] not in KNOWN for held in vars(each).values()
    ]
    reached, found = list(_functions(attributes)), {value for value in attributes if type(value) is int}
    for function in reached:  # grows while it runs
        named = [function.__globals__[name] for code in _codes(function.__code__) for name in code.co_names
                 if name in function.__globals__]  # fmt: skip
        held = [*named, *_cells(function)]
        found |= {value for value in held if type(value) is int}
        found |= {value for code in _codes(function.__code__) for value in code.co_consts if type(value) is int}
        reached += [each for each in _functions(held) if each not in reached]
    return found


def _functions(values: list[Any]) -> Iterator[FunctionType]:
    """Those among `values`, also within methods and properties, whose source is a user's."""
    for value in values:
        for inner in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
            plain = inner.__func__ if isinstance(inner, MethodType) else inner
            if isinstance(plain, FunctionType) and home_of(plain).split(".")[0] not in TRUSTED:
                yield plain


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, CodeType):
            yield from _codes(value)


def _cells(function: FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not assigned yet
            continue
