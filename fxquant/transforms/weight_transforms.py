"""Smoothing and rotation of checkpoint tensors: the same function with other weights.

A value x from a norm or a linear becomes `(x - shift) / scale`: the weights that produce it are divided, the linears
that read it multiplied:

norm.weight' = norm.weight / scale       norm.bias' = -shift / scale (float32)
W' = W * scale over in_features          bias' = bias + W @ shift
W' = W / scale over out_features, for a linear that produces the value

Before that, weights may be rotated, see `fxquant.transforms.rotation`. Each result is rounded to the model's dtype.
SmoothQuant (arXiv:2211.10438), Outlier Suppression+ (arXiv:2304.09145).
"""

from dataclasses import dataclass, field
from hashlib import blake2b

import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.transforms.rotation import Rotation


@dataclass
class WeightTransforms:
    """All transforms by checkpoint tensor. Grows while pairs are smoothed, in graph order.

    scales     weight of the norm or linear that produces the value → float32 scale, exact in the model's dtype
    columns    weight [n, k] that reads the value → key of its scale [k]
    rows       weight [n, k] that produces it → number of heads; the scale covers the last rows of each head
    shifts     norm weight → its shift, float32 [k]
    tensors    vectors that replace or extend the checkpoint's: norm weights and biases, linear biases
    rotations  weight → its rotation, applied first
    norms      norm weight → its original value, which rotated weights have absorbed
    """

    scales: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    shifts: dict[str, Tensor] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.scales or self.tensors or self.rotations)

    def column_scale(self, name: str) -> Tensor | None:
        """The float32 [k] that weight `name` is multiplied by, or None."""
        return self.scales[self.columns[name]] if name in self.columns else None

    def row_scale(self, name: str, out_features: int) -> Tensor | None:
        """The float32 [n] that weight `name` is divided by, or None."""
        if name not in self.rows:
            return None
        scale = self.scales[name].view(self.rows[name], -1)
        rows = torch.ones(len(scale), out_features // len(scale))
        rows[:, rows.shape[1] - scale.shape[1] :] = scale
        return rows.flatten()

    def apply(self, name: str, tensor: Tensor, out_features: int, start: int = 0) -> Tensor:
        """Smooth `tensor`, the rows of weight `name` from `start` on, in its own dtype; all rows if it is `mixed`.

        Raises FxquantError if the transforms are for another shape.
        """
        self.check(name, (out_features, *tensor.shape[1:]))
        return self._applied(name, tensor, out_features, start)

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises FxquantError unless the transforms of weight `name` fit `shape`: not those of another model's file."""
        if reason := self._misfit(name, shape):
            fact = f"its transforms do not fit shape {list(shape)}: {reason}."
            raise FxquantError(f"tensor {name}", fact, "Calibrate again: pass --calib TEXT.")

    def _misfit(self, name: str, shape: tuple[int, ...]) -> str:
        """Why the transforms of `name` are not for `shape`; "" if they are, or there are none."""
        columns, rotation = self.column_scale(name), self.rotations.get(name)
        if columns is None and rotation is None and name not in self.rows:
            return ""
        if len(shape) != 2:
            return "they are for a matrix"
        out_features, in_features = shape
        if columns is not None and len(columns) != in_features:
            return f"{len(columns)} scales of columns"
        if name in self.rows:
            heads, scales = self.rows[name], len(self.scales[name])
            if out_features % heads or scales % heads or scales > out_features:
                return f"{scales} scales of rows in {heads} heads"
        if rotation is None:
            return ""
        norm = self.norms.get(rotation.norm)
        if norm is not None and len(norm) != in_features:
            return f"a norm of {len(norm)}"
        return rotation.misfit(out_features, in_features)

    def _applied(self, name: str, tensor: Tensor, out_features: int, start: int) -> Tensor:
        dtype, columns, rows = tensor.dtype, self.column_scale(name), self.row_scale(name, out_features)
        if name in self.rotations:  # first: scales are computed on the rotated model
            tensor = self.rotations[name].apply(tensor, self.norms.get(self.rotations[name].norm))
        if columns is not None:
            tensor = (tensor.float() * columns).to(dtype)
        if rows is not None:
            tensor = (tensor.float() / rows[start : start + len(tensor), None]).to(dtype)
        return tensor

    def changes(self, name: str) -> bool:
        """Whether tensor `name` differs from the checkpoint's."""
        return any(name in changed for changed in (self.columns, self.rows, self.tensors, self.rotations))

    def mixes_rows(self, name: str) -> bool:
        """Whether rows of weight `name` depend on one another."""
        return name in self.rotations and self.rotations[name].heads > 0

    def key(self, names: list[str]) -> str | None:
        """Hash in hex of everything but the checkpoint that determines the tensors `names`; None if unchanged."""
        digest = blake2b(digest_size=16)
        for name in filter(self.changes, names):
            rotation = self.rotations.get(name)
            digest.update(f"{name} {self.rows.get(name)} {rotation}".encode())
            norm = self.norms.get(rotation.norm) if rotation else None
            for tensor in (self.column_scale(name), self.scales.get(name), self.tensors.get(name), norm):
                data = b"" if tensor is None else tensor.contiguous().view(torch.uint8).numpy().tobytes()
                # with the length, or different splits of the same bytes would have one digest
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest() if any(map(self.changes, names)) else None
