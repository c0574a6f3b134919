"""Weight checks: the weight files against the graph, the description and the source checkpoint."""

import random
from pathlib import Path

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.layout import StoredTensor, stored_tensors
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.program.program import Program
from fxquant.progress import Advance
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs
from fxquant.verification.module_check import ModuleCheck, stored_parameters
from fxquant.verification.reference import contradiction
from fxquant.verification.report import Check
from fxquant.verification.stored_rows import StoredRows, source_rows

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


def check_values(
    units: list[StoredTensor], files: WeightFiles, source: Checkpoint, advance: Advance, rows: int | None = None
) -> list[Check]:
    """Every tensor of `units` `==` recomputed by the slow reference; static ones against each other.

    rows  how many of each searched module's are recomputed, of its tensors with a row for each output; None: all
    """
    static = [unit for unit in units if unit.recipe is not None and unit.recipe.scheme.static]
    quantized = Check("quantized tensors == slow reference", sum(_data_free(unit.recipe) for unit in units))
    floats = Check("float tensors == source", sum(unit.recipe is None for unit in units))
    calibrated = Check("static parameters agree", len(static))
    sampled = 0
    for unit in units:
        missing = [n for n in _names(unit) if n not in files.tensors]
        if unit.name not in source.tensors or missing:
            (floats if unit.recipe is None else quantized).expect(
                False, f"{unit.name}: missing in the output or the source"
            )
        elif unit.recipe is None:
            compared = StoredRows(files.infos[unit.name])
            for _, block in source_rows(source, unit.name):
                compared.add(block.to(unit.spec.dtype))
            floats.expect(compared.same, f"{unit.name}: differs from the source")
        else:
            module = ModuleCheck(unit.recipe, unit.module, files, source)
            chosen = module.chosen(rows)
            sampled += chosen is not None
            module.check(chosen, quantized, calibrated)
        advance(unit.nbytes)
    if sampled:
        quantized.worst = f"{rows} rows of each of {sampled} searched modules"
    return [quantized, floats, calibrated]


def check_static(program: Program, files: WeightFiles) -> Check:
    """Static parameters against each other and the stored ranges, without a source."""
    recipes = [r for r in (*program.recipes.values(), *program.mtp.recipes.values()) if r.scheme.static]
    check = Check("static parameters agree", len(recipes))
    for recipe in recipes:
        stored = stored_parameters(recipe, recipe.module, files)
        reason = contradiction(recipe, stored, stored.get("bias"))
        check.expect(reason is None, f"{recipe.module}.{reason}")
    return check


def _data_free(recipe: Recipe | None) -> int:
    return 0 if recipe is None else len([role for role in tensor_specs(recipe) if role not in CALIBRATED])


def _names(unit: StoredTensor) -> list[str]:
    return (
        [unit.name] if unit.recipe is None else [tensor_name(unit.module, role) for role in tensor_specs(unit.recipe)]
    )


def expected_stored(program: Program, source: Checkpoint | None, files: WeightFiles) -> list[StoredTensor]:
    """The layout's tensors; without a source, float tensors are taken at their stored dtype."""
    if source is not None:
        return stored_tensors(program, source)
    believed = Checkpoint(Path(), program.config, dict(files.infos))
    return stored_tensors(program, believed)


__all__ = ["check_names", "check_static", "check_values", "expected_stored", "sample"]
