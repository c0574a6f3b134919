"""Contents of an output that is made from a folder that others wrote: its integers, in a target's format."""

import shlex
from pathlib import Path

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.compilation.ledger import Ledger, build_ledger
from fxquant.engines.contract import load_contract
from fxquant.engines.onnx_profile import weight_format
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.table import DEFAULT, ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.foreign.found import FoundFolder, find_folder
from fxquant.foreign.model import source_of_found
from fxquant.foreign.program import found_program
from fxquant.frontend.source import Source
from fxquant.lowering.convert import Converter, ConvertOptions, reformed, why_not
from fxquant.lowering.output import Contents
from fxquant.lowering.output_folder.layout import MAX_SHARD_SIZE, stored_tensors
from fxquant.lowering.output_folder.manifest import SourceFile
from fxquant.lowering.output_folder.serving_page import serving_of
from fxquant.passes.check_contract import linears
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe

POLICY = "found"
"""In place of a policy: nobody says which one it was."""


def foreign_contents(
    folder: Path, target: Target, source: Source | None, options: ConvertOptions = ConvertOptions()
) -> Contents:
    """Contents of the output. `source`: the model that `folder` was made from; None: its config.json says what it is.

    Raises FxquantError if its tensors contradict its description, or do not fit the format of `target`.
    """
    found = find_folder(folder, ENGINES[DEFAULT].description)
    model = source or source_of_found(found)
    result = found_program(found, model)
    if result.program is None:
        raise _unusable(folder, result.faults[0])
    engine = ENGINES[target]
    program = result.in_form_of(engine)
    checkpoint = Checkpoint(folder, program.config, dict(found.infos))
    _check_stored(folder, program, checkpoint)
    form = weight_format(engine, options.onnx.profile)(max(result.sizes, default=0))
    old = {**program.recipes, **program.mtp.recipes}
    for recipe in sorted(old.values(), key=lambda recipe: -recipe.group_size):  # groups first: they need other integers
        reason = why_not(_with_scales(recipe, found), form)
        if reason is not None:
            fact = f"{recipe.scheme}: {reason}."
            raise FxquantError(f"layer {recipe.module}", fact, f"Quantize the model again for {target}.")
    stamps = stamp_files(checkpoint_files(checkpoint))
    alone = options.graph_only and engine.model_code
    return Contents(
        program=reformed(program, form),
        checkpoint=checkpoint,
        producer=Converter(checkpoint, stamps, old, None),
        stamps=stamps,
        sources={file.name: SourceFile(header=s.header, size=s.size) for file, s in sorted(stamps.items())},
        calibration=None,
        float_graph=dump_program(model.program()),
        ledger=Ledger(()).as_json() if source is None else build_ledger(program, source.checkpoint).as_json(),
        source=folder,
        origin=folder if source is None else source.checkpoint.folder,
        policy=POLICY,
        target=target,
        max_shard_size=MAX_SHARD_SIZE,
        layout=checked_layout(load_contract(target), linears(program), options.tp, options.ep),
        serving=None if alone else serving_of(program, target, options.tp, options.ep),
        export=options.export,
        onnx=options.onnx,
        reusable=False,
        foreign=True,
    )


def _check_stored(folder: Path, program: Program, checkpoint: Checkpoint) -> None:
    """Raise FxquantError unless every tensor is there as its type makes it."""
    floats = {name for name in (*program.float_names(), *program.mtp.float_tensors) if name not in checkpoint.tensors}
    for name in sorted(floats):
        raise _unusable(folder, f"{name} is missing")
    for tensor in stored_tensors(program, checkpoint):
        info = checkpoint.tensors.get(tensor.name)
        if info is None or (info.dtype, info.shape) != (tensor.spec.dtype, tensor.spec.shape):
            raise _unusable(folder, f"{tensor.name} is missing, or not as its type makes it")


def _unusable(folder: Path, fault: str) -> FxquantError:
    command = f"fxquant verify {shlex.quote(str(folder))} --against MODEL"
    return FxquantError(folder, f"{fault}.", f"See what else is wrong, MODEL being what it was made from:\n{command}")


def _with_scales(recipe: Recipe, found: FoundFolder) -> Recipe:
    """`recipe` with the narrowest dtype in which its weight scales are exact."""
    names = [tensor_name(module, "weight_scale") for module in recipe.modules]
    scales = (found.read(name) for name in names if name in found.infos)
    exact = all(torch.equal(scale, scale.to(recipe.dtype).float()) for scale in scales)
    return Recipe(**vars(recipe) | {"scale_dtype": recipe.dtype}) if exact else recipe
