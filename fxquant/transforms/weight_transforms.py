"""Smoothed tensors of a checkpoint: the same function, other numbers.

A value x that a norm or a linear makes, and that linears read, becomes `(x - shift) / scale`; what makes it is divided,
what reads it multiplied:

norm.weight' = norm.weight / scale       norm.bias' = -shift / scale (float32)
W' = W * scale over in_features          bias' = bias + W @ shift
W' = W / scale over out_features, for a linear that makes the value

Before all that, weights may be turned, as `fxquant.transforms.rotation` says. Each result is rounded to the model's
dtype.
SmoothQuant (arXiv:2211.10438), Outlier Suppression+ (arXiv:2304.09145).
"""

from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.transforms.rotation import Turn


@dataclass
class Smoothing:
    """Every change, by checkpoint tensor. Grows while pairs are smoothed, in the order of the graph.

    scales   float32 vectors, each value one of the model's dtype, by the norm's or linear's weight that makes the value
    columns  weight [n, k] that reads the value → key of its scale [k]
    rows     weight [n, k] that makes it → heads: of the rows of each head the last ones have a scale, the others stay
    shifts   norm's weight → its shift, float32 [k]
    tensors  vectors that stand in the place of the checkpoint's, or beside them: norm weights and biases, linear biases
    turns    weight → how it is turned, before anything else
    norms    norm's weight → the checkpoint's, which turned weights have taken over
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    turns: dict[str, Turn] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scales or self.tensors or self.turns)

    def column_scale(self, name: str) -> Tensor | None:
        """float32 [k] that weight `name` is multiplied by."""
        return self.scales[self.columns[name]] if name in self.columns else None

    def row_scale(self, name: str, out_features: int) -> Tensor | None:
        """float32 [n] that weight `name` is divided by."""
        if name not in self.rows:
            return None
        scale = self.scales[name].view(self.rows[name], -1)
        rows = torch.ones(len(scale), out_features // len(scale))
        rows[:, rows.shape[1] - scale.shape[1] :] = scale
        return rows.flatten()

    def apply(self, name: str, tensor: Tensor, out_features: int, start: int = 0) -> Tensor:
        """`tensor`, the rows from `start` of weight `name` in its own dtype, smoothed; all rows where it is `mixed`.

        Raises FxquantError where what was smoothed had another shape.
        """
        try:
            return self._applied(name, tensor, out_features, start)
        except (RuntimeError, ArithmeticError, ValueError, IndexError) as error:
            fact = f"its smoothing does not fit {list(tensor.shape)}: {str(error)[:200]}."
            raise FxquantError(f"tensor {name}", fact, "Calibrate again: pass --calib TEXT.") from None

    def _applied(self, name: str, tensor: Tensor, out_features: int, start: int) -> Tensor:
        dtype, columns, rows = tensor.dtype, self.column_scale(name), self.row_scale(name, out_features)
        if name in self.turns:
            tensor = self.turns[name].apply(tensor, self.norms.get(self.turns[name].norm))
        if columns is not None:
            tensor = (tensor.float() * columns).to(dtype)
        if rows is not None:
            tensor = (tensor.float() / rows[start : start + len(tensor), None]).to(dtype)
        return tensor

    def changes(self, name: str) -> bool:
        """Whether tensor `name` is another than the checkpoint's."""
        return any(name in changed for changed in (self.columns, self.rows, self.tensors, self.turns))

    def mixed(self, name: str) -> bool:
        """Whether each row of weight `name` takes from other rows."""
        return name in self.turns and self.turns[name].heads > 0

    def key(self, names: list[str]) -> str | None:
        """What the smoothed `names` depend on besides the checkpoint, in hex; None if nothing."""
        digest = blake2b(digest_size=16)
        for name in filter(self.changes, names):
            turn = self.turns.get(name)
            digest.update(f"{name} {self.rows.get(name)} {turn}".encode())
            norm = self.norms.get(turn.norm) if turn else None
            for tensor in (self.column_scale(name), self.scales.get(name), self.tensors.get(name), norm):
                data = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest() if any(map(self.changes, names)) else None
