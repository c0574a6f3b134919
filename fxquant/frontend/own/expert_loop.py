"""Expert loop: a forward whose `for` runs experts one by one on the tokens that chose them, with one grouped call.

    for i in …:                                          y = y + self.experts(x, indices, weights)
        row, place = torch.where(indices == i)
        y[row] += self.experts[i](x[row]) * weights[row, place, None]

What the loop reads and writes is found in its statements; that the guess is right is for the proof to say, which runs
the forward as it is written.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from fxquant.frontend.own.source import compiled, syntax_tree
from fxquant.frontend.recognition.source_code import unwrapped


@dataclass(frozen=True)
class Loop:
    """One loop over experts.

    experts   attribute of the module that holds the list
    x, indices, weights, y  names of tokens [N, H], chosen experts [N, K], their weights [N, K] and the sum [N, H]
    """

    statement: ast.For
    experts: str
    x: str
    indices: str
    weights: str
    y: str


def grouped_forward(module: nn.Module) -> tuple[Callable[..., Any], str] | None:
    """The forward of `module` with its loop over experts as one call, and the attribute that holds the experts.

    None if the forward, or a method that it calls, has no such loop. The call is `self.<experts>(x, indices, weights)`.
    """
    for name in _methods(module):
        function = unwrapped(getattr(type(module), name))
        tree = syntax_tree(function)
        loop = find_loop(tree, {key for key, held in module._modules.items() if isinstance(held, nn.ModuleList)})
        if loop is not None:
            replaced = MethodType(compiled(_without(tree, loop), function), module)
            if name == "forward":
                return replaced, loop.experts
            return _with_method(module, name, replaced), loop.experts
    return None


def find_loop(tree: ast.FunctionDef, lists: set[str]) -> Loop | None:
    """The loop of `tree` that calls members of one of the module lists `lists`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.For):
            found = _read(tree, node, lists)
            if found is not None:
                return found
    return None


def _read(tree: ast.FunctionDef, loop: ast.For, lists: set[str]) -> Loop | None:
    indices = _compared(loop) or _one_hot(tree, loop)
    called = next(_expert_calls(loop, lists), None)
    y = next(_accumulated(loop), None)
    if called is None or indices is None or y is None:
        return None
    experts, call = called
    weights = next((name for name in _subscripted(loop) if name not in (y, indices, *_names(call.args[0]))), None)
    x = next((name for name in _names(call.args[0]) if name in set(_outside(loop))), None)
    if weights is None or x is None:
        x = x or next((name for name in _sources(loop, call) if name in set(_outside(loop))), None)
    if weights is None or x is None:
        return None
    return Loop(loop, experts, x, indices, weights, y)


def _expert_calls(loop: ast.For, lists: set[str]) -> Iterator[tuple[str, ast.Call]]:
    """(list, call) of each call of a member, also by a name that the loop gave it."""
    named: dict[str, str] = {}
    if isinstance(loop.iter, ast.Call):
        for argument in loop.iter.args:  # enumerate(self.experts), zip(…, self.experts)
            if _own_list(argument, lists):
                for target in ast.walk(loop.target):
                    if isinstance(target, ast.Name):
                        named[target.id] = _own_list(argument, lists) or ""
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            member = _member(node.value, lists)
            if member:
                named[node.targets[0].id] = member
    for node in ast.walk(loop):
        if isinstance(node, ast.Call) and node.args:
            by_name = named.get(node.func.id) if isinstance(node.func, ast.Name) else None
            member = _member(node.func, lists) or by_name
            if member:
                yield member, node


def _member(node: ast.expr, lists: set[str]) -> str | None:
    return _own_list(node.value, lists) if isinstance(node, ast.Subscript) else None


def _own_list(node: ast.expr, lists: set[str]) -> str | None:
    own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
    return node.attr if own and isinstance(node, ast.Attribute) and node.attr in lists else None


def _compared(loop: ast.For) -> str | None:
    """The name that is compared with the loop's expert."""
    for node in ast.walk(loop):
        match node:
            case ast.Compare(left=ast.Name(id=name), ops=[ast.Eq()]) if name in set(_outside(loop)):
                return name
    return None


def _one_hot(tree: ast.FunctionDef, loop: ast.For) -> str | None:
    """The name whose one_hot the loop reads."""
    outside = set(_outside(loop))
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and set(_names(node.targets[0])) & outside:
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call) and ast.unparse(call.func).endswith("one_hot"):
                    return next(_names(call.args[0]), None)
    return None


def _accumulated(loop: ast.For) -> Iterator[str]:
    """Names that are added to: `y[…] += …`, `y[…] = y[…] + …`, `y.index_add_(…)`."""
    for node in ast.walk(loop):
        match node:
            case ast.Assign(
                targets=[ast.Subscript() as sum_], value=ast.BinOp(left=ast.Subscript() as one, op=ast.Add())
            ):
                if ast.unparse(sum_) == ast.unparse(one):
                    yield from _names(sum_.value)
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add) and isinstance(node.target, ast.Subscript):
            yield from _names(node.target.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "index_add_":
            yield from _names(node.func.value)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            function = node.value.func
            if isinstance(function, ast.Attribute) and function.attr == "index_add":
                yield from _names(function.value)


def _subscripted(loop: ast.For) -> Iterator[str]:
    """Names from outside of the loop that are read by several places: `weights[row, place]`."""
    outside = set(_outside(loop))
    for node in ast.walk(loop):
        match node:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Tuple(), ctx=ast.Load()) if name in outside:
                yield name


def _sources(loop: ast.For, call: ast.Call) -> Iterator[str]:
    """What the name that an expert is called with was made of."""
    wanted = set(_names(call.args[0]))
    for node in ast.walk(loop):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in wanted:
            yield from _names(node.value)


def _outside(loop: ast.For) -> Iterator[str]:
    """Names that the loop reads and does not make itself."""
    made = {node.id for node in ast.walk(loop) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    yield from (name for name in _names(loop) if name not in made)


def _names(node: ast.AST) -> Iterator[str]:
    yield from (each.id for each in ast.walk(node) if isinstance(each, ast.Name) and each.id != "self")


class _Replace(ast.NodeTransformer):
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def visit_For(self, node: ast.For) -> ast.AST:
        if node is not self.loop.statement:
            return self.generic_visit(node)
        y, loop = self.loop.y, self.loop
        text = f"{y} = {y} + self.{loop.experts}({loop.x}, {loop.indices}, {loop.weights})"
        return ast.copy_location(ast.parse(text).body[0], node)


def _without(tree: ast.FunctionDef, loop: Loop) -> ast.FunctionDef:
    """`tree` with the call, and without what only the loop read of tensors' values."""
    tree = _Replace(loop).visit(tree)
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    tree.body = [each for each in tree.body if not _only_for_loop(each, read)]
    return tree


def _only_for_loop(statement: ast.stmt, read: set[str]) -> bool:
    """Whether it assigns names that nothing reads any more."""
    if not isinstance(statement, ast.Assign):
        return False
    names = [node for target in statement.targets for node in ast.walk(target)]
    plain = all(isinstance(node, ast.Name | ast.Tuple | ast.Store) for node in names)
    return plain and not {node.id for node in names if isinstance(node, ast.Name)} & read


def _methods(module: nn.Module) -> Iterator[str]:
    """`forward`, and the methods of its class that are not torch's."""
    yield "forward"
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return
        yield from (name for name, held in vars(cls).items() if isinstance(held, FunctionType) and name[0] != "_")


def _with_method(module: nn.Module, name: str, replaced: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        object.__setattr__(module, name, replaced)
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            object.__delattr__(module, name)

    return forward
