"""Smoothing of a folder that others wrote, as far as its tensors show it.

A smoothed value has a maker, whose output features were divided by a scale, and weights that read it, whose columns
were multiplied by it. A norm shows the scale itself, `source / stored`; of a matrix, rows give it up to their rounding.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.program.linears import READS, is_parameter, not_scalable, weight_uses
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program

ROUNDINGS = 2.2
"""Half steps of the model's dtype between a scale read off a norm and a weight: both of them are rounded."""


@dataclass(frozen=True)
class Factor:
    """Per feature: the multiple of the source that is stored, float64; `spread`: its relative uncertainty."""

    values: Tensor
    spread: float


@dataclass(frozen=True)
class Value:
    """A value that may be smoothed: names of the tensors that make it and that read it. `heads`: of an attention, whose
    last `width` rows of each head make it; 0: all rows do. `norm`: its maker is the weight of a norm."""

    maker: str
    readers: tuple[str, ...]
    norm: bool = False
    heads: int = 0
    width: int = 0

    def made(self, rows: Tensor) -> Tensor:
        """Of one number per row of the maker, those that the readers read."""
        return rows.view(self.heads, -1)[:, -self.width :].flatten() if self.heads else rows

    def scaled(self, rows: Tensor) -> Tensor:
        """`rows`, and 1 for the rows of the maker that do not make it."""
        if not self.heads:
            return rows
        split = rows.view(self.heads, -1).clone()
        split[:, : -self.width] = 1.0
        return split.flatten()


def smoothable(program: Program) -> Iterator[Value]:
    """Every value of a float graph that quantizers smooth."""
    weights = weight_uses(program)
    for node in program.graph.graph.nodes:
        if node.target == ops.rms_norm and not_scalable(node, node, weights) is None:
            yield Value(_names(program, node, "weight")[0], _readers(program, node), norm=True)
        elif node.target == ops.mla_attention:
            maker = operand_node(node, "kv")
            if not_scalable(node, maker, weights) is None:
                heads, width = (int(str(operand(node, name))) for name in ("num_heads", "v_head_dim"))
                names = _names(program, maker, "weight")
                yield Value(names[0], _readers(program, node), heads=heads, width=width)
        elif node.target == ops.swiglu:
            maker = operand_node(node, "up")
            if not_scalable(node, maker, weights) is None:
                yield Value(_names(program, maker, "weight")[0], _readers(program, node))
        elif node.target == ops.moe_experts:
            pairs = zip(_names(program, node, "up_proj"), _names(program, node, "down_proj"), strict=True)
            yield from (Value(up, (down,)) for up, down in pairs)


def _names(program: Program, node: fx.Node, argument: str) -> tuple[str, ...]:
    weight = operand_node(node, argument)
    return program.parameter(weight).names if is_parameter(weight) else ("",)


def _readers(program: Program, value: fx.Node) -> tuple[str, ...]:
    return tuple(
        name
        for user in value.users
        for argument in READS.get(user.target, ())
        for name in _names(program, user, argument)
    )


class Smoothing:
    """Factors of the tensors of a folder, found when they are asked for.

    `rows_of` gives the factor of a matrix's rows, None if it is as its source. `seen`: makers that are smoothed.
    """

    def __init__(self, program: Program, norm: Callable[[str], tuple[Tensor, Tensor] | None], half_step: float) -> None:
        values = list(smoothable(program))
        self.makers = {value.maker: value for value in values}
        self._reads = {name: value for value in values for name in value.readers}
        self._norm, self._half_step = norm, half_step
        self._found: dict[str, Factor | None] = {}
        self.seen: set[str] = set()

    def columns(self, name: str, rows_of: Callable[[str], Factor | None]) -> Factor | None:
        """By how much the columns of weight `name` were multiplied; None if its input is not smoothed."""
        value = self._reads.get(name)
        if value is None:
            return None
        if value.maker not in self._found:
            self._found[value.maker] = self._of_norm(value.maker) if value.norm else self._of_rows(value, rows_of)
            if self._found[value.maker] is not None:
                self.seen.add(value.maker)
        return self._found[value.maker]

    def read_by(self, name: str) -> Value | None:
        """The value that weight `name` reads; None if it is none that can be smoothed."""
        return self._reads.get(name)

    def _of_norm(self, name: str) -> Factor | None:
        norm = self._norm(name)
        if norm is None:
            return None
        stored, source = norm
        if torch.equal(stored, source):
            return None
        scale = torch.where(stored == source, 1.0, source.double() / stored.double())
        return Factor(scale, ROUNDINGS * self._half_step)

    def _of_rows(self, value: Value, rows_of: Callable[[str], Factor | None]) -> Factor | None:
        rows = rows_of(value.maker)
        return None if rows is None else Factor(1 / value.made(rows.values), rows.spread + self._half_step)
