"""Weight checks: the weight files against the graph, the description and the source checkpoint."""

import random
from pathlib import Path

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.layout import StoredTensor, stored_tensors
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.ops.quantized import expand_int4
from fxquant.program.program import Program
from fxquant.progress import Advance
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs
from fxquant.storage.hashing import hash_bytes
from fxquant.verification.reference import (
    codes_along_k,
    contradiction,
    expected_codes,
    expected_tensors,
    wrong_codes,
)
from fxquant.verification.report import Check

CALIBRATED = ("input_scale", "input_offset", "deq_scale", "quant_bias")


def check_names(files: WeightFiles, stored: list[StoredTensor]) -> Check:
    """Names, dtypes and shapes against the graph."""
    names = Check("tensors: name, dtype, shape", len(stored))
    expected = {tensor.name: tensor.spec for tensor in stored}
    for name, spec in expected.items():
        info = files.infos.get(name)
        stored_as = "missing" if info is None else f"{info.dtype}{list(info.shape)}"
        same = info is not None and info.dtype is spec.dtype and info.shape == spec.shape
        names.expect(same, f"{name}: {stored_as}, the graph says {spec.dtype}{list(spec.shape)}")
    for name in sorted(set(files.infos) - set(expected)):
        names.expect(False, f"{name}: in the files, not in the graph")
    return names


def check_stored(program: Program, files: WeightFiles) -> None:
    """Raise FxquantError unless the files have every parameter of the graph, in its shape: then it can be run."""
    specs = {
        tensor_name(module, role): spec.shape
        for recipe in program.recipes.values()
        for role, spec in tensor_specs(recipe).items()
        for module in recipe.modules
    }
    for target, parameter in program.parameters.items():
        shape = tuple(program.graph.tensor(target).shape)[1 if parameter.stacked else 0 :]
        for name in parameter.names:
            info, expected = files.tensors.get(name), specs.get(name, shape)
            if info is None or info.shape != expected:
                fact = f"tensor {name} is {'missing' if info is None else list(info.shape)}"
                raise FxquantError(files.folder, f"{fact}, the graph says {list(expected)}.", "Compile again.")


def sample(stored: list[StoredTensor], count: int | None) -> list[StoredTensor]:
    """One StoredTensor per module (its weight) or float tensor; `count` of them (seeded), or all."""
    parts = (part for tensor in stored for part in tensor.parts)
    units = [part for part in parts if part.recipe is None or part.role == "weight"]
    if count is None or count >= len(units):
        return units
    return [units[index] for index in sorted(random.Random(0).sample(range(len(units)), count))]


def check_values(units: list[StoredTensor], files: WeightFiles, source: Checkpoint, advance: Advance) -> list[Check]:
    """Every tensor of `units` `==` recomputed by the slow reference; static ones against each other."""
    static = [unit for unit in units if unit.recipe is not None and unit.recipe.scheme.static]
    quantized = Check("quantized tensors == slow reference", sum(_data_free(unit.recipe) for unit in units))
    floats = Check("float tensors == source", sum(unit.recipe is None for unit in units))
    calibrated = Check("static parameters agree", len(static))
    for unit in units:
        missing = [n for n in _names(unit) if n not in files.tensors]
        if unit.name in source.tensors and not missing:
            _check_unit(unit, files, source, quantized, floats, calibrated)
        else:
            (floats if unit.recipe is None else quantized).expect(
                False, f"{unit.name}: missing in the output or the source"
            )
        advance(unit.nbytes)
    return [quantized, floats, calibrated]


def _check_unit(
    unit: StoredTensor, files: WeightFiles, source: Checkpoint, quantized: Check, floats: Check, calibrated: Check
) -> None:
    recipe, module = unit.recipe, unit.module
    if recipe is None:
        want = source.read(unit.name).to(unit.spec.dtype)
        floats.expect(same_bytes(files.read(unit.name), want), f"{unit.name}: differs from the source")
        return
    bias = source.read(tensor_name(module, "bias")) if recipe.bias else None
    weight = source.read(unit.name)
    searched, solved = expected_codes(recipe, weight), None
    if recipe.algorithm.from_inputs:
        solved = stored_codes(recipe, module, files)
        reason = wrong_codes(recipe, weight, solved, searched)
        quantized.expect(reason is None, f"{unit.name}: {reason}")
        quantized.checked -= 1  # of no tensor in the total
    for role, want in expected_tensors(recipe, weight, bias, solved, searched).items():
        name = tensor_name(module, role)
        quantized.expect(same_bytes(files.read(name), want), f"{name}: {_where(files, name, want)}")
    if recipe.scheme.static:
        stored = _stored(recipe, module, files)
        reason = contradiction(recipe, stored, bias, searched[1])
        calibrated.expect(reason is None, f"{module}.{reason}")


def check_static(program: Program, files: WeightFiles) -> Check:
    """Static parameters against each other and the stored ranges, without a source."""
    recipes = [r for r in (*program.recipes.values(), *program.mtp.recipes.values()) if r.scheme.static]
    check = Check("static parameters agree", len(recipes))
    for recipe in recipes:
        stored = _stored(recipe, recipe.module, files)
        reason = contradiction(recipe, stored, stored.get("bias"))
        check.expect(reason is None, f"{recipe.module}.{reason}")
    return check


class StoredCodes:
    """The codes of every quantized module of a folder, from its weight files: no source has those of GPTQ."""

    def __init__(self, program: Program, files: WeightFiles) -> None:
        self._recipes = {module: recipe for recipe in program.recipes.values() for module in recipe.modules}
        self._files = files

    def __call__(self, module: str) -> Tensor:
        return stored_codes(self._recipes[module], module, self._files)

    def digest(self, module: str) -> str:
        """XXH3-128 of the module's codes, in hex."""
        return hash_bytes(self(module).numpy().tobytes())


def stored_codes(recipe: Recipe, module: str, files: WeightFiles) -> Tensor:
    """int8 [n, k], unpacked."""
    weight = files.read(tensor_name(module, "weight"))
    if weight.dtype is torch.uint8:
        return codes_along_k(weight)
    return expand_int4(weight, None) if recipe.int4 and recipe.weight_format.packed else weight


def same_bytes(x: Tensor, y: Tensor) -> bool:
    """Equal dtype, shape and bits; -0.0 and NaN payloads count."""
    same = x.dtype is y.dtype and x.shape == y.shape
    return same and torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8))


def _data_free(recipe: Recipe | None) -> int:
    return 0 if recipe is None else len([role for role in tensor_specs(recipe) if role not in CALIBRATED])


def _names(unit: StoredTensor) -> list[str]:
    return (
        [unit.name] if unit.recipe is None else [tensor_name(unit.module, role) for role in tensor_specs(unit.recipe)]
    )


def _stored(recipe: Recipe, module: str, files: WeightFiles) -> dict[str, Tensor]:
    """Role → tensor, of one of the recipe's modules."""
    return {role: files.read(tensor_name(module, role)) for role in tensor_specs(recipe)}


def _where(files: WeightFiles, name: str, want: Tensor) -> str:
    """The first element that differs."""
    stored = files.read(name)
    if stored.shape != want.shape or stored.dtype is not want.dtype:
        return f"{stored.dtype}{list(stored.shape)}, expected {want.dtype}{list(want.shape)}"
    different = (stored != want).nonzero()
    if not len(different):
        return "differs in the sign of a zero or in a NaN"
    place = tuple(different[0].tolist())
    return f"{len(different)} elements differ, first at {list(place)}: {stored[place].item()}, not {want[place].item()}"


def expected_stored(program: Program, source: Checkpoint | None, files: WeightFiles) -> list[StoredTensor]:
    """The layout's tensors; without a source, float tensors are taken at their stored dtype."""
    if source is not None:
        return stored_tensors(program, source)
    believed = Checkpoint(Path(), program.config, dict(files.infos))
    return stored_tensors(program, believed)


__all__ = ["check_names", "check_static", "check_values", "expected_stored", "sample"]
