"""Weights of a folder that others wrote, against the source: every integer within half a step of what it stands for."""

from collections.abc import Collection
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.output_folder.layout import StoredTensor
from fxquant.passes.pair_smoothing import restore_biases
from fxquant.program.program import Program
from fxquant.progress import Advance, Reporter
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.verification.foreign_formulas import FORMULAS, Tensors, check_formulas, count, tensors_of
from fxquant.verification.foreign_smoothing import Factor, Smoothing, Value
from fxquant.verification.foreign_steps import dequantized, difference, looks_fed_back
from fxquant.verification.report import Check

SLACK = 2.0**-18
"""Of float32 arithmetic on both sides."""


@dataclass
class ForeignWeights:
    """Compares one module or float tensor after the other. `uncompared`: weight → why it is neither right nor wrong."""

    found: Tensors
    source: Checkpoint
    program: Program
    original: Program
    advance: Advance
    uncompared: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.quantized = Check("quantized weights ≈ source, within half a step", 0)
        self.floats = Check("float tensors == source, or smoothed", 0)
        self.formulas = Check(FORMULAS, 0)
        self.checks = [self.quantized, self.floats, self.formulas]
        self._recipes = {n: r for r in self.program.recipes.values() for n in r.weight_names}
        self._recipes |= {n: r for r in self.program.mtp.recipes.values() for n in r.weight_names}
        half_step = torch.finfo(self.program.dtype).eps / 2
        self._smoothing = Smoothing(self.original, self._norm, half_step)
        self._rows: dict[str, Factor | None] = {}
        self._half_step = half_step

    def check(self, unit: StoredTensor) -> None:
        """One unit: a float tensor, or the weight of a module with all that belongs to it."""
        if unit.name not in self.found.infos:
            return  # the check of names has it
        if unit.recipe is not None:
            check_formulas(self.formulas, unit.recipe, unit.module, tensors_of(self.found, unit.recipe, unit.module))
        biased = module_and_role(unit.name)[1] == "bias"
        if unit.name not in self.source.tensors and not biased:
            check = self.floats if unit.recipe is None else self.quantized
            count(check, False, f"{unit.name}: the source has no such tensor")
        elif unit.recipe is not None:
            self._matrix(unit.name, self.quantized)
            self._bias(unit)
        elif len(unit.spec.shape) == 2:
            self._matrix(unit.name, self.floats)
        else:
            self._vector(unit.name)
        self.advance(unit.nbytes)

    def squared_error(self, name: str) -> tuple[float, float]:
        """Of a quantized weight the squared error against the source, smoothed as the folder is, and its squares."""
        source = self.source.read(name).double()
        columns = self._smoothing.columns(name, self._rows_of)
        rows = self._rows_of(name)
        source = source if columns is None else source * columns.values
        source = source if rows is None else source * rows.values[:, None]
        stored = self._far(name, source.float(), 0.0)[1].double()
        return float(((stored - source) ** 2).sum()), float((source**2).sum())

    def _norm(self, name: str) -> tuple[Tensor, Tensor] | None:
        """A norm's weight here and in the source; None unless both have it in one shape."""
        here, there = self.found.infos.get(name), self.source.tensors.get(name)
        if here is None or there is None or here.shape != there.shape:
            return None
        return self.found.read(name), self.source.read(name)

    def smoothed(self) -> list[str]:
        """Tensors that made smoothed values."""
        return sorted(self._smoothing.seen)

    def _matrix(self, name: str, check: Check) -> None:
        reason = self._reason(name)
        if name not in self.uncompared:
            count(check, reason is None, f"{name}: {reason}")

    def _reason(self, name: str) -> str | None:
        """Why a weight can't be the source's, or None. Keeps the factor of its rows, if that explains it."""
        self._rows[name] = None
        source = self.source.read(name).float()
        if source.shape != self._shape(name):
            return f"{list(self._shape(name))}, the source has {list(source.shape)}"
        columns = self._smoothing.columns(name, self._rows_of)
        spread = 0.0
        if columns is not None:
            source, spread = (source.double() * columns.values).float(), columns.spread
        far, stored = self._far(name, source, spread)
        if not far.any():
            return None
        if name in self._smoothing.makers and not self._smoothing.makers[name].norm:
            rows = self._factor(stored, source, self._smoothing.makers[name])
            rescaled = (source.double() * rows.values[:, None]).float()
            if not self._far(name, rescaled, spread + rows.spread)[0].any():
                self._rows[name] = rows
                return None
        if name in self._recipes and looks_fed_back(stored, source, far):
            self.uncompared[name] = (
                "its codes are not the nearest ones, as GPTQ's are not: only their sum of squares fits"
            )
            return None
        value = self._smoothing.read_by(name)
        maker = f", as {value.maker} is smoothed" if columns is not None and value is not None else ""
        return difference(far, stored, source) + maker

    def _rows_of(self, name: str) -> Factor | None:
        if name not in self._rows and name in self.found.infos and name in self.source.tensors:
            self._reason(name)
        return self._rows.get(name)

    def _far(self, name: str, source: Tensor, spread: float) -> tuple[Tensor, Tensor]:
        """Where a weight is beyond what its scheme allows from `source`, and what it stands for."""
        recipe, allowed = self._recipes.get(name), source.abs() * (spread + SLACK)
        if recipe is None:
            stored = self.found.read(name).float()
            bound = (spread + self._half_step) * source.abs() if spread else torch.zeros_like(source)
            return ~((stored - source).abs() <= bound), stored
        weight = dequantized(recipe, tensors_of(self.found, recipe, module_and_role(name)[0]), source)
        bound = torch.where(weight.last, weight.end, weight.half) + allowed
        return ~((weight.values - source).abs() <= bound), weight.values

    def _factor(self, stored: Tensor, source: Tensor, value: Value) -> Factor:
        """Of each row the multiple of the source that comes nearest, and how far rounding may move it."""
        wide, exact = stored.double(), source.double()
        squares = (exact**2).sum(1).clamp(min=1e-300)
        rows = (wide * exact).sum(1) / squares
        rows = value.scaled(torch.where(rows > 0, rows, 1.0))
        noise = ((wide - rows[:, None] * exact) ** 2).sum(1) / squares / rows**2
        # the mean of k roundings: four standard deviations of it
        spread = 4 * float(noise.max()) ** 0.5 / exact.shape[1] ** 0.5
        return Factor(rows, min(spread, 0.05) + 2 * self._half_step)

    def _vector(self, name: str) -> None:
        stored = self.found.read(name)
        module, role = module_and_role(name)
        norm = tensor_name(module, "weight")
        value = self._smoothing.makers.get(norm)
        if role == "bias" and name not in self.source.tensors:
            shifts = value is not None and value.norm
            count(self.floats, shifts or not stored.any(), f"{name}: not zero, and the source has none")
            return
        source = self.source.read(name)
        same = stored.shape == source.shape and torch.equal(stored, source.to(stored.dtype))
        may = value is not None and value.norm and stored.shape == source.shape and bool((stored / source > 0).all())
        if may and not same:
            self._smoothing.columns(value.readers[0], self._rows_of) if value else None
        count(self.floats, same or may, f"{name}: {_first(stored, source)}")

    def _bias(self, unit: StoredTensor) -> None:
        """bias' = bias + W @ shift, if the norm before it shifts."""
        assert unit.recipe is not None
        name = tensor_name(unit.module, "bias")
        if not unit.recipe.bias or name not in self.found.infos:
            return
        weight = self.source.read(unit.name).double()
        before = self.source.read(name).double() if name in self.source.tensors else torch.zeros(len(weight)).double()
        shift, factor = self._shift(unit.name), self._rows_of(unit.name)
        expected = before + weight @ shift
        expected = expected if factor is None else expected * factor.values
        bound = 8 * self._half_step * (weight.abs() @ shift.abs() + expected.abs())
        far = ~((self.found.read(name).double() - expected).abs() <= bound)
        reason = "the shift of the norm before it, times the weight, gives another"
        count(self.floats, not far.any(), f"{name}: {int(far.sum())} elements differ: {reason}")

    def _shift(self, name: str) -> Tensor:
        value = self._smoothing.read_by(name)
        zero = torch.zeros(self._shape(name)[1]).double()
        if value is None or not value.norm:
            return zero
        bias = tensor_name(module_and_role(value.maker)[0], "bias")
        if bias not in self.found.infos or bias in self.source.tensors:
            return zero
        columns = self._smoothing.columns(name, self._rows_of)
        stored = self.found.read(bias).double()
        return -stored if columns is None else -stored * columns.values

    def _shape(self, name: str) -> tuple[int, ...]:
        recipe = self._recipes.get(name)
        return self.found.infos[name].shape if recipe is None else (recipe.out_features, recipe.in_features)


def compare_foreign(
    folder: Tensors,
    source: Checkpoint,
    program: Program,
    original: Program,
    units: list[StoredTensor],
    report: Reporter,
) -> tuple[list[Check], dict[str, str]]:
    """Checks of `units` against `source`, `original` being the float graph; and weight → why it was not compared."""
    restore_biases(original, folder.infos.keys())
    with report("verify weights", sum(unit.nbytes for unit in units), "bytes") as advance:
        weights = ForeignWeights(folder, source, program, original, advance)
        for unit in units:
            weights.check(unit)
    smoothed = weights.smoothed()
    if smoothed:
        weights.quantized.worst = f"{len(smoothed)} values are smoothed, the first by {smoothed[0]}"
    return weights.checks, weights.uncompared


def formulas_alone(folder: Tensors, program: Program, wrong: Collection[str] = ()) -> Check:
    """What follows from the tensors of each module that is not in `wrong`."""
    check = Check(FORMULAS, 0)
    for recipe in (*program.recipes.values(), *program.mtp.recipes.values()):
        for module in recipe.modules:
            if module not in wrong:
                check_formulas(check, recipe, module, tensors_of(folder, recipe, module))
    return check


def _first(stored: Tensor, source: Tensor) -> str:
    if stored.shape != source.shape:
        return f"{list(stored.shape)}, the source has {list(source.shape)}"
    different = (stored != source).nonzero()
    return f"differs from the source, first at {different[0].tolist()}" if len(different) else "equal"
