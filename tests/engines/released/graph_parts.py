"""What the rewritten graph of a folder multiplies by, linear by linear, and each rank's part of it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.ops.quantized import decode_deq_scale, expand_int4
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, Scheme

FLOAT = Scheme.FLOAT.value


class NotDivisibleError(Exception):
    """The groups of a linear can't be dealt out: whatever an engine made of them, it is not the graph."""


@dataclass(frozen=True)
class Part:
    """A linear, or a rank's part of it: `y = x_hat @ (codes * scale).T`, and what static schemes add.

    kind     its scheme
    codes    int32 [n, k], int4 times its group's second scale; float [n, k] for FLOAT
    scale    float32 [n], that of the weight, as stored; for static ones without it, deq_scale / input_scale
    second   float32 [n, G], or None: then codes are what is stored
    tensors  the other stored tensors: deq_scale, quant_bias, input_scale, input_offset, scale_bias, bias
    """

    kind: str
    codes: Tensor
    scale: Tensor | None
    second: Tensor | None
    tensors: dict[str, Tensor]

    def rows(self, part: slice) -> "Part":
        """Output features."""
        tensors = {role: value if len(value) == 1 else value[part] for role, value in self.tensors.items()}
        second = None if self.second is None else self.second[part]
        return Part(self.kind, self.codes[part], None if self.scale is None else self.scale[part], second, tensors)

    def columns(self, rank: int, ranks: int) -> "Part":
        """Input features of one of `ranks`; the columns of scale_bias go with them."""
        tensors = dict(self.tensors)
        if "scale_bias" in tensors:
            tensors["scale_bias"] = tensors["scale_bias"].chunk(ranks, 1)[rank]
        if self.second is not None and self.second.shape[1] % ranks:
            raise NotDivisibleError(f"{self.second.shape[1]} groups of k on {ranks} ranks")
        second = None if self.second is None else self.second.chunk(ranks, 1)[rank]
        return Part(self.kind, self.codes.chunk(ranks, 1)[rank], self.scale, second, tensors)


class GraphParts:
    """Every linear of a compiled folder, of its multi-token prediction layers too, and its other float tensors."""

    def __init__(self, folder: Path) -> None:
        self.program: Program = load_program(folder / GRAPH)
        self._files = WeightFiles(folder)
        recipes = [*self.program.recipes.values(), *self.program.mtp.recipes.values()]
        self._recipes: dict[str, Recipe] = {module: recipe for recipe in recipes for module in recipe.modules}
        self._known: dict[str, Part] = {}

    def stored(self, name: str) -> Tensor | None:
        """A tensor of the folder."""
        return self._files.read(name) if name in self._files.infos else None

    def kind(self, module: str) -> str:
        """The scheme of a linear."""
        return self._recipes[module].scheme.value if module in self._recipes else FLOAT

    def linear(self, module: str) -> Part:
        """A whole linear."""
        if module not in self._known:
            recipe = self._recipes.get(module)
            weight = self._files.read(tensor_name(module, "weight"))
            self._known[module] = Part(FLOAT, weight, None, None, {}) if recipe is None else self._quantized(module)
        return self._known[module]

    def _quantized(self, module: str) -> Part:
        recipe = self._recipes[module]
        names = {role: tensor_name(module, role) for role in ROLES}
        tensors = {role: self._files.read(name) for role, name in names.items() if name in self._files.infos}
        weight, second = tensors.pop("weight"), tensors.pop("weight_scale_second", None)
        codes = expand_int4(weight, second) if recipe.int4 else weight
        scale = tensors.pop("weight_scale", None)
        if scale is None:
            scale = decode_deq_scale(tensors["deq_scale"]) / tensors["input_scale"].float()
        return Part(recipe.scheme.value, codes.to(torch.int32), scale.flatten(), second, tensors)


ROLES = (
    "weight", "weight_scale", "weight_scale_second", "scale_bias", "deq_scale", "quant_bias", "input_scale",
    "input_offset", "bias",
)  # fmt: skip


def stacked(parts: list[Part]) -> Part:
    """Linears that an engine holds as one, one below the other."""
    first = parts[0]
    tensors = {
        role: value if len(value) == 1 else torch.cat([part.tensors[role] for part in parts])
        for role, value in first.tensors.items()
    }
    scale = None if first.scale is None else torch.cat([part.scale for part in parts if part.scale is not None])
    second = None if first.second is None else torch.cat([part.second for part in parts if part.second is not None])
    return Part(first.kind, torch.cat([part.codes for part in parts]), scale, second, tensors)
