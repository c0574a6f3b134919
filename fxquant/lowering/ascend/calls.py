"""Calls as text: the right-hand sides of statements, and where they are broken into lines.

Operators of the device import this beside their kernels, and a process that only runs a compiled module imports them:
nothing here may need the program.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

WIDTH = 120
INDENT = "    "
NPU = "torch.ops.npu."


@dataclass(frozen=True)
class Call:
    """`head(arguments)tail`; if too long for a line, it is broken between arguments.

    `outputs`: for each result of the call, its index among the results of the graph's operator, None if that does not
    have it. Empty: the same results in the same order.
    """

    head: str
    arguments: tuple[str, ...]
    tail: str = ""
    outputs: tuple[int | None, ...] = ()

    def __str__(self) -> str:
        return f"{self.head}({', '.join(self.arguments)}){self.tail}"


def assignment(target: str, value: Call | str, depth: int = 1) -> list[str]:
    """Source lines of `target = value`, to be indented `depth` times. Many targets get a separate line."""
    head = value.head if isinstance(value, Call) else ""
    if len(f"{target} = {head}(") > WIDTH - depth * len(INDENT):
        return ["(", f"{INDENT}{target}", *broken(") = ", value, "", depth)]
    return broken(f"{target} = ", value, "", depth)


def broken(before: str, value: Call | str, after: str, depth: int) -> list[str]:
    """Source lines of `before + value + after`, no longer than WIDTH if it has arguments to break at."""
    line, room = f"{before}{value}{after}", WIDTH - depth * len(INDENT)
    if len(line) <= room or isinstance(value, str):
        return [line]
    rows = [INDENT]
    for piece in _pieces(value.arguments, room - len(INDENT) - 1):
        if rows[-1] != INDENT and len(rows[-1]) + len(piece) + 1 > room:
            rows.append(INDENT)
        rows[-1] += f"{piece}, "
    rows[-1] = rows[-1].removesuffix(", ")
    return [f"{before}{value.head}(", *(row.rstrip() for row in rows), f"){value.tail}{after}"]


def _pieces(arguments: tuple[str, ...], room: int) -> Iterator[str]:
    """Arguments; the items of a list that is too long for a line come one by one."""
    for argument in arguments:
        if len(argument) > room:
            yield from argument.split(", ")
        else:
            yield argument


Emitter = Callable[..., Call | str]
"""(writer, node, its operands by name) → source of the right-hand side of the node's statement."""


@dataclass(frozen=True)
class Fused:
    """One statement for a call and the call that makes its operand `operand`, which has no separate statement.

    statement  that of the outer call
    """

    operand: str
    statement: Emitter
