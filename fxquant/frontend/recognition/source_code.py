"""Normalized source of a class's forward: what it computes, without comments, annotations and names of locals.

The source of a forward and of every function it calls, in the order of the calls, as one list of statements. Functions
of torch, transformers and Python stand by their name; a submodule stands by the attribute that holds it.
"""

import ast
import builtins
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from fxquant.frontend.recognition.plain_names import PlainNames

TRUSTED = ("torch", "math", "transformers", "fxquant", "kernel", "einops", "warnings", "functools", "typing")
"""Packages whose functions are known by their name; `kernel` has the FP8 kernels beside DeepSeek's inference code,
which float weights never reach."""
WRAPPERS = ("torch", "transformers", "contextlib")
"""Packages whose decorators change nothing that a version does not say: its source has them by name."""
DEPTH = 12
"""Functions that a forward reaches, at most; one that reaches more is no published one."""


@dataclass(frozen=True)
class Statement:
    """One statement, the body of a compound one apart: its normalized text with locals unnamed, and where it stands."""

    text: str
    file: str
    line: int

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits of the SHA-256 of `text`."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Code:
    """digest: SHA-256 of the normalized source. constants: the values of global names that it reads."""

    digest: str
    statements: tuple[Statement, ...]
    constants: dict[str, Any]


def code_of(cls: type[nn.Module], forward: Callable[..., Any]) -> Code | None:
    """The code of `forward` as methods of `cls` and functions of its file complete it; None if it has no source."""
    try:
        return _Reader(cls).read(forward)
    except (OSError, TypeError, SyntaxError, RecursionError):
        return None


class _Reader:
    """Reads functions one after the other, each once, in the order in which they are called."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self.cls = cls
        self.functions: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.home = ""

    def read(self, forward: Callable[..., Any]) -> Code:
        """All that `forward` reaches."""
        self.called(forward)
        self.home = home_of(self.functions[0])
        texts, statements = [], []  # type: list[str], list[Statement]
        for number, function in enumerate(self.functions):  # grows while it runs
            if number > DEPTH:
                raise RecursionError("too many functions")
            tree, file, first = _tree(function)
            named = PlainNames(tree, partial(self._global, function)).visit(tree)
            texts.append(ast.unparse(named))
            statements += [Statement(text, file, first + line - 1) for text, line in _statements(named)]
        return Code(hashlib.sha256("\n\n".join(texts).encode()).hexdigest(), tuple(statements), self.constants)

    def called(self, function: Any) -> str:
        """The number of a function whose own code is part of this one."""
        plain = unwrapped(function)
        if plain not in self.functions:
            self.functions.append(plain)
        return f"function{self.functions.index(plain)}"

    def _global(self, function: FunctionType, chain: list[str]) -> str | None:
        """What stands for the dotted `chain`, which begins with a name that `function` does not assign."""
        if chain[0] == "self" and len(chain) > 1:
            return self._own(chain)
        value = _lookup(function, chain[0])
        if value is MISSING:
            return None
        used = 1
        while isinstance(value, ModuleType) and used < len(chain) and hasattr(value, chain[used]):
            value, used = getattr(value, chain[used]), used + 1
        if isinstance(value, bool | int | float | str | type(None)) and not isinstance(value, type):
            if used == 1 or not _trusted(chain[0], function):
                self.constants[".".join(chain[:used])] = value
            return None
        named = self._named(value, ".".join(chain[:used]))
        return ".".join([named, *chain[used:]])

    def _named(self, value: Any, written: str) -> str:
        if isinstance(value, ModuleType) and sys.modules.get(value.__name__) is value:
            return value.__name__
        if not isinstance(value, FunctionType):
            known = _package(value) in (*TRUSTED, "builtins", "logging", None)
            return written.rpartition(".")[2] if known else f"own {written}"
        home = home_of(value)
        foreign = home != self.home and home.split(".")[0] in TRUSTED
        return written.rpartition(".")[2] if foreign else self.called(value)

    def _own(self, chain: list[str]) -> str | None:
        method = inspect.getattr_static(self.cls, chain[1], None)
        if isinstance(method, staticmethod):
            method = method.__func__
        if isinstance(method, FunctionType) and not _base(method):
            return ".".join([self.called(method), *chain[2:]])
        if isinstance(method, property) and method.fget is not None:
            return ".".join([self.called(method.fget), *chain[2:]])
        return None


MISSING = object()


def _package(value: Any) -> str | None:
    """The package of a class, of a function in C, or of the class of an object."""
    module = getattr(value, "__module__", None) or type(value).__module__
    return module.split(".")[0] if isinstance(module, str) else type(value).__module__.split(".")[0]


def _trusted(name: str, function: FunctionType) -> bool:
    """Whether `name` is a package whose values are known."""
    return getattr(_lookup(function, name), "__name__", "").split(".")[0] in TRUSTED


def _base(method: FunctionType) -> bool:
    return home_of(method).startswith("torch.nn.")


def home_of(function: Any) -> str:
    """The module whose source a function stands in; `__module__` is copied by `functools.wraps`."""
    return str(function.__globals__["__name__"])


def unwrapped(function: Any) -> Any:
    """What wrappers of torch and transformers stand around; a wrapper of anyone else is code that counts."""
    plain = function.__func__ if isinstance(function, MethodType) else function
    while isinstance(plain, FunctionType) and hasattr(plain, "__wrapped__"):
        if home_of(plain).split(".")[0] not in WRAPPERS:
            return plain
        plain = plain.__wrapped__
    return plain


def _lookup(function: FunctionType, name: str) -> Any:
    closure = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    if name in closure:
        try:
            return closure[name].cell_contents
        except ValueError:
            return MISSING
    return function.__globals__.get(name, getattr(builtins, name, MISSING))


def _tree(function: Any) -> tuple[ast.FunctionDef, str, int]:
    """The function's syntax tree, its file, and the line of the file that is line 1 of the tree."""
    lines, first = inspect.getsourcelines(function.__code__)  # of the function itself, not of what it wraps
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError("not a function")
    return tree, inspect.getsourcefile(function) or "", first


def _statements(tree: ast.FunctionDef) -> Iterator[tuple[str, int]]:
    """Each statement's own text, locals unnamed, and its line."""
    for node in _in_order(tree):
        yield _header(node), node.lineno


def _in_order(node: ast.AST) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _in_order(child)


def _header(node: ast.stmt) -> str:
    bodies: dict[str, Any] = {
        name: [] for name in ("body", "orelse", "finalbody", "handlers", "cases") if hasattr(node, name)
    }
    kind = type(node)
    fields = {name: bodies.get(name, value) for name, value in ast.iter_fields(node)}
    text = ast.unparse(ast.fix_missing_locations(ast.copy_location(kind(**fields), node)))
    return PlainNames.unnamed(text) + (" else" if getattr(node, "orelse", None) else "")
