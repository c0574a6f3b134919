"""Plain names: a function's syntax tree with its locals numbered, and without annotations, docstrings and messages."""

import ast
import copy
import re
from collections.abc import Callable
from typing import Any

Resolve = Callable[[list[str]], str | None]
"""What stands for a dotted chain of names that begins with a global; None: the chain as it is written."""
NEUTRAL = (
    "inference_mode", "no_grad", "override", "add_start_docstrings_to_model_forward", "replace_return_docstrings",
)  # fmt: skip
"""Decorators that change nothing in inference."""


class PlainNames(ast.NodeTransformer):
    """Rewrites a function; locals are numbered in the order in which they first occur."""

    def __init__(self, function: ast.FunctionDef, resolve: Resolve) -> None:
        self.resolve = resolve
        self.numbers: dict[str, str] = {}
        self.locals = _assigned(function)

    @staticmethod
    def unnamed(text: str) -> str:
        """`text` with every numbered local as `_`."""
        return re.sub(r"\blocal\d+\b", "_", text)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        """A function, also one inside another: no name, no annotations, no docstring."""
        node.name = self._local(node.name) if node.name in self.locals else "function"
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.copy_location(ast.Pass(), node)]
        node.returns = None
        decorators, node.decorator_list = node.decorator_list, []
        self.generic_visit(node)
        node.decorator_list = [self.visit(each) for each in decorators if not self._is_neutral(each)]
        return node

    def _is_neutral(self, decorator: ast.expr) -> bool:
        """By the resolved name: a file's own decorator is a number, whatever it is called."""
        called = decorator.func if isinstance(decorator, ast.Call) else decorator
        return ast.unparse(self.visit(copy.deepcopy(called))).rpartition(".")[2] in NEUTRAL

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """A parameter."""
        return ast.copy_location(ast.arg(arg=self._local(node.arg)), node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        """`x: int = 3` is `x = 3`."""
        if node.value is None:
            return None
        return self.visit(ast.copy_location(ast.Assign([node.target], node.value), node))

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """Without its message."""
        node.msg = None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        """Without what it raises."""
        return ast.copy_location(ast.Raise(), node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A string on its own is a comment."""
        if isinstance(node.value, ast.Constant):
            return ast.copy_location(ast.Pass(), node)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A local by its number, a global as `resolve` has it."""
        if node.id in self.locals:
            return ast.copy_location(ast.Name(self._local(node.id), node.ctx), node)
        return self._resolved([node.id], node) or node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """A chain of attributes, resolved from its first name."""
        chain = _chain(node)
        if chain is None or (chain[0] in self.locals and chain[0] != "self"):
            return self.generic_visit(node)
        resolved = self._resolved(chain, node)
        if resolved is not None:
            return resolved
        if chain[0] == "self":
            return node
        return self.generic_visit(node)

    def _resolved(self, chain: list[str], node: Any) -> ast.AST | None:
        text = self.resolve(chain)
        return None if text is None else ast.copy_location(ast.Name(text, node.ctx), node)

    def _local(self, name: str) -> str:
        if name == "self":
            return name
        return self.numbers.setdefault(name, f"local{len(self.numbers)}")


def _assigned(function: ast.FunctionDef) -> set[str]:
    """Names of parameters, of what is assigned, and of functions inside."""
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
    names |= {node.name for node in ast.walk(function) if isinstance(node, ast.FunctionDef) and node is not function}
    outside = [name for node in ast.walk(function) if isinstance(node, ast.Global) for name in node.names]
    return names - set(outside)


def _chain(node: ast.expr) -> list[str] | None:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else None
