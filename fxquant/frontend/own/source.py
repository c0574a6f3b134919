"""Source of a user's function as a syntax tree, and a changed tree as a function again, with its lines."""

import ast
import inspect
import textwrap
from types import FunctionType
from typing import Any


def syntax_tree(function: Any) -> ast.FunctionDef:
    """The function without decorators, numbered as in its file. Raises OSError or TypeError without a source."""
    lines, first = inspect.getsourcelines(function.__code__)  # of the function itself, not of what it wraps
    tree = ast.parse(textwrap.dedent("".join(lines))).body[0]
    if not isinstance(tree, ast.FunctionDef):
        raise TypeError("not a function")
    ast.increment_lineno(tree, first - 1)
    tree.decorator_list = []
    return _of_self(tree)


def _of_self(tree: ast.FunctionDef) -> ast.FunctionDef:
    """A method's first parameter by its usual name."""
    first = next((each.arg for each in tree.args.args), "self")
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.arg == first:
            node.arg = "self"
        elif isinstance(node, ast.Name) and node.id == first:
            node.id = "self"
    return tree


def compiled(tree: ast.FunctionDef, function: FunctionType) -> FunctionType:
    """`tree` as a function that sees the globals of `function`, as they are now, and its closure."""
    cells = (cell.cell_contents for cell in function.__closure__ or ())
    scope = {**function.__globals__, **dict(zip(function.__code__.co_freevars, cells, strict=True))}
    module = ast.fix_missing_locations(ast.Module([tree], []))
    exec(compile(module, inspect.getsourcefile(function) or "model.py", "exec"), scope)  # noqa: S102
    made = scope[tree.name]
    made.__defaults__, made.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return made
