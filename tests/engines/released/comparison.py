"""Differences between what an engine holds or computes and what it should, with derived bounds."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import U, half_step
from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.ops.quantized import decode_deq_scale, expand_int4
from fxquant.program.program_file import load_program
from fxquant.schemes.schemes import Recipe, Scheme


@dataclass
class Comparison:
    """Against one judge: differences, and the largest error as a fraction of its bound."""

    differences: list[str] = field(default_factory=list)
    compared: int = 0
    worst: float = 0.0

    def equal(self, place: str, held: Tensor, expected: Tensor) -> None:
        """Every element, and dtype and shape."""
        self.compared += 1
        if held.shape != expected.shape or held.dtype != expected.dtype:
            shapes = f"{held.dtype} {list(held.shape)}, not {expected.dtype} {list(expected.shape)}"
            self.differences.append(f"{place}: {shapes}")
        elif not torch.equal(held, expected):
            self.differences.append(f"{place}: {int((held != expected).sum())} of {held.numel()} elements differ")

    def within(self, place: str, result: Tensor, expected: Tensor, bound: Tensor) -> None:
        """No element further off than `bound` and one rounding to the dtype of `result`."""
        self.compared += 1
        error = (result.double() - expected).abs()
        allowed = bound + half_step((expected.abs() + bound).float(), result.dtype) + 2 * U * expected.abs()
        share = float((error / allowed.clamp(min=2.0**-149)).nan_to_num(nan=torch.inf).max())
        self.worst = max(self.worst, share)
        if not bool((error <= allowed).all()):
            self.differences.append(f"{place}: output error {float(error.norm() / expected.norm()):.2g}")


@dataclass(frozen=True)
class Graph:
    """The rewritten graph's parameters by module: recipes, integer codes, and scales."""

    recipes: dict[str, Recipe]
    files: WeightFiles
    dtype: torch.dtype

    @classmethod
    def of(cls, folder: Path) -> "Graph":
        program = load_program(folder / GRAPH)
        recipes = {name: recipe for recipe in program.recipes.values() for name in recipe.modules}
        mtp = {name: recipe for recipe in program.mtp.recipes.values() for name in recipe.modules}
        return cls(recipes | mtp, WeightFiles(folder), program.dtype)

    def linears(self, mtp: str, draft: bool) -> list[str]:
        """Paths of all linears with a weight [n, k], float ones too, of the model or of its layer `mtp`."""
        ends = ("_proj.weight", "_with_mqa.weight")
        weights = [name.removesuffix(".weight") for name in self.files.infos if name.endswith(ends)]
        return sorted(name for name in {*weights, *self.recipes} if name.startswith(f"{mtp}.") == draft)

    def codes(self, module: str) -> Tensor:
        """float64 [n, k], with two levels the codes times their group's scale."""
        stored, second = self.files.read(f"{module}.weight"), f"{module}.weight_scale_second"
        if self.recipes[module].int4:
            stored = expand_int4(stored, self.files.read(second) if second in self.files.infos else None)
        return stored.double()

    def scale(self, module: str) -> Tensor:
        """float32 [n]: what multiplies the integer sums, beside the scale of a token."""
        if self.recipes[module].scheme is Scheme.W8A8:
            return decode_deq_scale(self.files.read(f"{module}.deq_scale")).flatten()
        return self.files.read(f"{module}.weight_scale").flatten()

    def quant_bias(self, module: str) -> Tensor | None:
        """float64 [n], of a static linear."""
        name = f"{module}.quant_bias"
        return self.files.read(name).double() if name in self.files.infos else None
