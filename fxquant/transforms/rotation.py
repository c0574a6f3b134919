"""Rotation of weights by an orthogonal matrix that leaves the model's function unchanged: QuaRot's offline rotations
(Ashkboos et al. 2024, arXiv:2404.00456), which add no operator to the graph.

A value x becomes x Q. Its consumers use W Q, its producers Qᵀ W. A norm between them commutes with Q once its weight is
moved into its consumers: W diag(g) Q, and the norm's own weight is all ones.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from fxquant.transforms.hadamard import NoHadamardError, base_order, rotated

SLAB = 1 << 18
"""Values converted to float32 at a time."""


class Rotate(StrEnum):
    """The rotated values: the residual stream, or the values of each head between kv_b and o_proj."""

    HIDDEN = "hidden"
    HEADS = "heads"


@dataclass(frozen=True)
class Rotation:
    """Rotation of one weight [n, k], with Q as in `fxquant.transforms.hadamard.rotated`.

    columns  number of equal parts of in_features, each rotated by its own Q, `W Q`; 0: none
    norm     checkpoint name of the norm's weight g that is multiplied into the columns first, `W diag(g)`; "": none
    heads    number of equal parts of out_features, of which the last `values` rows are rotated, `Qᵀ W`; 0: none
    """

    columns: int = 0
    norm: str = ""
    heads: int = 0
    values: int = 0

    def apply(self, weight: Tensor, norm: Tensor | None) -> Tensor:
        """Some rows of the weight (all of them if `heads`), rotated in float32 and rounded once to their dtype."""
        out, width = torch.empty_like(weight), weight.shape[1]
        part = width // self.columns if self.columns else 1
        # heads combine rows, columns combine columns: slabs are whole in the direction that is combined
        tall, wide = (len(weight), max(1, SLAB // len(weight) // part) * part) if self.heads else (_rows(width), width)
        for row in range(0, len(weight), tall):
            for column in range(0, width, wide):
                place = slice(row, row + tall), slice(column, column + wide)
                slab = weight[place].float()
                if norm is not None:
                    slab = slab * norm[place[1]].float()
                out[place] = self._rotated(slab, part).to(weight.dtype)
        return out

    def misfit(self, out_features: int, in_features: int) -> str:
        """Why it is not a rotation of a weight [n, k]; "" if it is."""
        if self.columns and in_features % self.columns:
            return f"rotations of {self.columns} equal parts of columns"
        if self.heads and (out_features % self.heads or not 0 < self.values <= out_features // self.heads):
            return f"rotations of {self.values} rows in each of {self.heads} heads"
        orders = ([in_features // self.columns] if self.columns else []) + ([self.values] if self.heads else [])
        try:
            for order in orders:
                base_order(order)
        except NoHadamardError as error:
            return str(error)
        return ""

    def vector(self, bias: Tensor) -> Tensor:
        """The bias [n] of the rotated linear."""
        return Rotation(heads=self.heads, values=self.values).apply(bias.view(-1, 1), None).view(-1)

    def _rotated(self, slab: Tensor, part: int) -> Tensor:
        if self.columns:
            slab = rotated(slab.reshape(-1, part)).view(slab.shape)
        if self.heads:
            rows = slab.view(self.heads, -1, slab.shape[1])
            last_rows = rows[:, -self.values :].mT.reshape(-1, self.values)
            rows[:, -self.values :] = rotated(last_rows).view(self.heads, -1, self.values).mT
        return slab


def _rows(width: int) -> int:
    return max(1, SLAB // width)
