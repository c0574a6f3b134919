"""One output folder → the form of another target, where its integers allow it: nothing is quantized again."""

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from fxquant.checkpoint import Checkpoint
from fxquant.dialects import Dialect
from fxquant.errors import FxquantError
from fxquant.kernels.recipe import int4_tensors
from fxquant.lowering.engines import ENGINES, group_size
from fxquant.lowering.layout import MAX_SHARD_SIZE
from fxquant.lowering.manifest import FLOAT_GRAPH, GRAPH, LEDGER, read_manifest
from fxquant.lowering.output import Contents
from fxquant.lowering.verify.weights import WeightFiles
from fxquant.ops.quantized import expand_int4
from fxquant.program import Program
from fxquant.program_file import load_program
from fxquant.schemes import Recipe, Scheme, tensor_specs
from fxquant.targets import Target
from fxquant.weights import Read


def converted_contents(folder: Path, target: Target, into: Path) -> Contents:
    """What `into` will be made of. Raises FxquantError where a module of `folder` does not fit the target's form."""
    manifest, program = read_manifest(folder), load_program(folder / GRAPH)
    files, source = WeightFiles(folder), manifest.source_path(folder)
    form = ENGINES[target].dialect(group_size(program))
    old = {**program.recipes, **program.mtp.recipes}
    for recipe in sorted(old.values(), key=lambda recipe: -recipe.group_size):
        reason = why_not(recipe, form)
        if reason is not None:
            policy = "deepseek_w4a8_per_channel" if recipe.group_size else manifest.policy
            command = f"fxquant compile {source} --policy {policy} --target {target} -o {into}"
            raise FxquantError(f"layer {recipe.module}", f"{recipe.scheme}: {reason}.", f"Quantize anew: {command}")
    return Contents(
        program=_reformed(program, form),
        checkpoint=Checkpoint(folder, program.config, dict(files.infos)),
        make=Converter(old, files.read),
        float_graph=(folder / FLOAT_GRAPH).read_text(encoding="utf-8"),
        ledger=json.loads((folder / LEDGER).read_text(encoding="utf-8")),
        source=source,
        origin=manifest.checkpoint_path(folder),
        policy=manifest.policy,
        target=target,
        max_shard_size=MAX_SHARD_SIZE,
    )


def _reformed(program: Program, form: Dialect) -> Program:
    recipes = {module: replace(recipe, dialect=form) for module, recipe in program.recipes.items()}
    mtp = {module: replace(recipe, dialect=form) for module, recipe in program.mtp.recipes.items()}
    return replace(program, recipes=recipes, mtp=replace(program.mtp, recipes=mtp))


def why_not(recipe: Recipe, form: Dialect) -> str | None:
    """None where the module's integers and scales can be stored in `form` as they are, else the reason."""
    if recipe.dialect is form:
        return None
    if form.model_dtype_scales and recipe.group_size:
        return "its second scales have no place in a file with one scale per channel"
    if form.model_dtype_scales and recipe.scale_dtype is not recipe.dtype:
        dtype = str(recipe.dtype).removeprefix("torch.")
        return f"its weight scales need float32, engines of this form hold them in {dtype}, up to 2**-8 off"
    if form.static_weight_scale and not recipe.dialect.static_weight_scale and recipe.scheme is Scheme.W8A8:
        return "this form has weight_scale beside a static linear, which the other one does not store"
    return None


class Converter:
    """Recipe of the new form and module → its tensors, from those of the old one."""

    def __init__(self, old: dict[str, Recipe], read: Read) -> None:
        self._old, self._read = old, read

    def __call__(self, recipe: Recipe, module: str) -> dict[str, Tensor]:
        before = self._old[recipe.module]
        stored = {suffix: self._read(f"{module}.{suffix}") for suffix in tensor_specs(before)}
        if recipe.int4 and before.dialect.packed is not recipe.dialect.packed:
            stored |= _repacked(before, recipe, stored)
        return {suffix: stored[suffix].to(spec.dtype) for suffix, spec in tensor_specs(recipe).items()}


def _repacked(before: Recipe, recipe: Recipe, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    codes = expand_int4(stored["weight"], None) if before.dialect.packed else stored["weight"]
    return int4_tensors(recipe, codes, stored["weight_scale"], stored.get("weight_scale_second"))
