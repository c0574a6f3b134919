"""Convert an output folder to another target's weight format, if its integers allow it; nothing is quantized again."""

import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import FileStamp, StampedBytes, Stamps, checkpoint_files, stamp_files
from fxquant.engines.contract import load_contract
from fxquant.engines.documents import group_size
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import weight_format
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.frontend.published import refuse_changed
from fxquant.inputs.json_file import read_json, read_text
from fxquant.inputs.limits import GRAPH_BYTES
from fxquant.kernels.module_tensors import int4_tensors
from fxquant.kernels.pack_int4 import unpack_blocks
from fxquant.lowering.output import Contents
from fxquant.lowering.output_folder.copies import DAMAGED, damaged, may_be_copied
from fxquant.lowering.output_folder.layout import MAX_SHARD_SIZE
from fxquant.lowering.output_folder.manifest import (
    FLOAT_GRAPH,
    GRAPH,
    LEDGER,
    MANIFEST,
    Manifest,
    UnitRecord,
    read_manifest,
)
from fxquant.lowering.output_folder.serving_page import serving_of
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.lowering.own_files import is_plain
from fxquant.lowering.weights.digests import file_digest
from fxquant.lowering.weights.producer import BLOCK_BYTES, CheckpointProducer, tensor_bytes
from fxquant.lowering.weights.unit import Unit
from fxquant.ops.quantized import expand_int4
from fxquant.passes.check_contract import linears
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.policy.rule import AUTO
from fxquant.program.program import Program
from fxquant.program.program_file import load_program, recipe_arguments
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Activation, Recipe, tensor_specs
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.hashing import hash_bytes, hash_text
from fxquant.storage.safetensors import header_bytes
from fxquant.storage.system_errors import stopping

PER_CHANNEL = "deepseek_w4a8_per_channel"


@dataclass(frozen=True)
class ConvertOptions:
    """As `CompileOptions` has them."""

    tp: int | None = None
    ep: int | None = None
    graph_only: bool = False
    export: bool = True
    onnx: OnnxForm = OnnxForm()


def converted_contents(
    folder: Path, target: Target, into: Path, options: ConvertOptions = ConvertOptions()
) -> Contents:
    """Contents of `into`. Raises FxquantError if a module of `folder` does not fit the target's weight format, or the
    target's engine does not run its graph."""
    manifest = check_documents(folder)
    alone = options.graph_only and ENGINES[target].model_code
    if not alone:
        _check_graph(folder, manifest, target)
    program, source = load_program(folder / GRAPH), manifest.source_path(folder)
    form = weight_format(ENGINES[target], options.onnx.profile)(group_size(program))
    old = {**program.recipes, **program.mtp.recipes}
    for recipe in sorted(old.values(), key=lambda recipe: -recipe.group_size):  # groups first: they need another policy
        reason = why_not(recipe, form)
        if reason is not None:
            policy = _policy_for(manifest.policy, recipe)
            command = ["fxquant", "compile", source, "--policy", policy, "--target", target, "-o", into]
            raise FxquantError(
                f"layer {recipe.module}",
                f"{recipe.scheme}: {reason}.",
                f"Quantize again:\n{shlex.join(map(str, command))}",
            )
    checkpoint = Checkpoint(folder, program.config, dict(WeightFiles(folder, program).tensors))
    stamps = stamp_files(checkpoint_files(checkpoint))
    saved = folder / CALIBRATION
    layout = checked_layout(load_contract(target), linears(program), options.tp, options.ep)
    return Contents(
        program=reformed(program, form),
        checkpoint=checkpoint,
        producer=Converter(checkpoint, stamps, old, manifest.units),
        stamps=stamps,
        sources=manifest.sources,
        calibration=load_calibration(saved) if saved.is_file() else None,
        float_graph=read_text(folder / FLOAT_GRAPH, GRAPH_BYTES),
        ledger=read_json(folder / LEDGER, GRAPH_BYTES),
        source=source,
        origin=manifest.checkpoint_path(folder),
        policy=manifest.policy,
        target=target,
        max_shard_size=MAX_SHARD_SIZE,
        layout=layout,
        serving=None if alone else serving_of(program, target, options.tp, options.ep),
        export=options.export,
        onnx=options.onnx,
        reusable=False,
        documents=manifest.digests,
    )


def _policy_for(policy: str, recipe: Recipe) -> str:
    """The policy with which to quantize again: the same, unless it is for groups on every target."""
    fits = recipe.group_size == 0 or policy not in shipped_policies() or _sizes_itself(policy)
    return policy if fits else PER_CHANNEL


def _sizes_itself(policy: str) -> bool:
    return any(rule.group_size == AUTO for rule in load_policy(policy).rules)


def _check_graph(folder: Path, manifest: Manifest, target: Target) -> None:
    """Raise FxquantError if the target's engine runs another graph than that of `folder`."""
    promised = ENGINES[Target(manifest.target)].model_code and not manifest.graph_only
    from_file = manifest.source != manifest.checkpoint
    if ENGINES[target].model_code and not promised and from_file:
        refuse_changed(load_program(folder / FLOAT_GRAPH), target)


def check_documents(folder: Path) -> Manifest:
    """The manifest of an output, after checking the files that `convert` reads: all exist and are as they were written;
    of weight files only the headers are compared. Raises FxquantError for the first that differs."""
    manifest = read_manifest(folder)
    read = {GRAPH, FLOAT_GRAPH, LEDGER, CALIBRATION} | {name for name in manifest.digests if may_be_copied(name)}
    for name in sorted(read & manifest.digests.keys() | manifest.weights.keys()):
        file = folder / name
        if not is_plain(name) or not file.is_file():
            raise FxquantError(file, "is missing, but the manifest lists it.", DAMAGED)
        with stopping(file, "cannot be read"):
            written, digest = manifest.digests.get(name), manifest.weights.get(name)
            if written not in (None, file_digest(file)) or digest not in (None, hash_bytes(header_bytes(file))):
                raise damaged(file)
    return manifest


def reformed(program: Program, form: WeightFormat) -> Program:
    """The program with its linears in another format."""
    recipes = {module: replace(recipe, weight_format=form) for module, recipe in program.recipes.items()}
    mtp = {module: replace(recipe, weight_format=form) for module, recipe in program.mtp.recipes.items()}
    return replace(program, recipes=recipes, mtp=replace(program.mtp, recipes=mtp))


def why_not(recipe: Recipe, form: WeightFormat) -> str | None:
    """None if the module's integers and scales can be stored in `form` unchanged, else the reason."""
    if recipe.weight_format is form:
        return None
    if form.model_dtype_scales and recipe.group_size:
        return "its second scales have no place in a file with one scale per channel"
    if form.model_dtype_scales and recipe.scale_dtype is not recipe.dtype:
        dtype = str(recipe.dtype).removeprefix("torch.")
        return f"its weight scales need float32, but engines of this format hold them in {dtype}, up to 2**-8 off"
    if (
        form.static_weight_scale
        and not recipe.weight_format.static_weight_scale
        and recipe.scheme.activation is Activation.PER_TENSOR
    ):
        return "the new format has weight_scale beside a static linear, which these files do not hold"
    return None


def _packing(recipe: Recipe) -> tuple[bool, bool]:
    return recipe.weight_format.packed, recipe.weight_format is WeightFormat.BLOCKS


def _codes(recipe: Recipe, stored: Tensor) -> Tensor:
    """int8 [n, k] of rows as they are stored."""
    if recipe.weight_format is WeightFormat.BLOCKS:
        return unpack_blocks(stored)
    return expand_int4(stored, None) if recipe.weight_format.packed else stored


class Converter:
    """Producer of units in the new format from the tensors of the old one, block by block.

    `units`: the manifest's, with the hashes that tensors must have; None for a folder without a manifest.
    """

    def __init__(
        self, checkpoint: Checkpoint, stamps: Stamps, old: dict[str, Recipe], units: Mapping[str, UnitRecord] | None
    ) -> None:
        self._checkpoint, self._old, self._units = checkpoint, old, units
        self._files, self._float = StampedBytes(stamps), CheckpointProducer(checkpoint, stamps)

    def key(self, unit: Unit) -> str:
        arguments = None if unit.recipe is None else recipe_arguments(unit.recipe)
        made = unit.name if self._units is None else self._record(unit.name).key
        # no compile has such a key, so --reuse never takes a converted unit
        return hash_text(json.dumps(["converted", made, arguments]))

    def stamps_of(self, unit: Unit) -> list[FileStamp]:
        return []

    def prefetch(self, unit: Unit) -> None:
        for suffix in () if unit.recipe is None else tensor_specs(self._old[unit.recipe.module]):
            self._files.prefetch(self._checkpoint.tensors[unit.tensor_name(suffix)])

    def pieces(self, unit: Unit) -> Iterator[tuple[str, memoryview]]:
        if unit.recipe is None:
            yield from self._float_pieces(unit)
            return
        before, recipe = self._old[unit.recipe.module], unit.recipe
        suffixes = set()
        if recipe.int4 and _packing(before) != _packing(recipe):
            for suffix, tensor in self._repacked(unit.name, before, recipe):
                suffixes.add(suffix)
                yield suffix, tensor_bytes(tensor)
        for suffix, spec in tensor_specs(recipe).items():
            if suffix in suffixes:
                continue
            if suffix not in tensor_specs(before):  # zero points, which are all 0
                yield suffix, tensor_bytes(torch.zeros(spec.shape, dtype=spec.dtype))
            else:
                stored = self._checkpoint.tensors[unit.tensor_name(suffix)]
                for block in self._blocks(unit.name, suffix, BLOCK_BYTES):
                    yield suffix, tensor_bytes(block.view(stored.dtype).to(spec.dtype))

    def _float_pieces(self, unit: Unit) -> Iterator[tuple[str, memoryview]]:
        digest = xxhash.xxh3_128()
        for suffix, data in self._float.pieces(unit):
            digest.update(data)
            yield suffix, data
        self._compare(unit.name, "", digest.hexdigest())

    def _repacked(self, module: str, before: Recipe, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
        """int4 codes in the other packing, and `scale_bias` if the new format has it."""
        names = [suffix for suffix in ("weight_scale", "weight_scale_second") if suffix in tensor_specs(before)]
        scales = {suffix: self._read(module, suffix) for suffix in names}
        # packing puts two rows into a byte: a block of unpacked rows holds whole pairs
        spec = tensor_specs(before)["weight"]
        width, pair = spec.shape[1], 1 if before.weight_format.packed else 2
        step, first = width * pair * max(1, BLOCK_BYTES // (width * pair)), 0
        for block in self._blocks(module, "weight", step):
            codes = _codes(before, block.view(spec.dtype).view(-1, width))
            rows = slice(first, first + len(codes))
            second = scales["weight_scale_second"][rows] if recipe.group_size else None
            tensors = int4_tensors(recipe, codes, scales["weight_scale"][rows], second)
            yield from ((suffix, tensors[suffix]) for suffix in ("weight", "scale_bias") if suffix in tensors)
            first = rows.stop

    def _read(self, module: str, suffix: str) -> Tensor:
        tensor = self._checkpoint.tensors[tensor_name(module, suffix)]
        data = self._files.read(tensor)
        self._compare(module, suffix, hash_bytes(data))
        return torch.frombuffer(data, dtype=tensor.dtype).view(tensor.shape)

    def _blocks(self, module: str, suffix: str, step: int) -> Iterator[Tensor]:
        """The tensor's bytes, `step` at a time; after the last, their hash is compared with the manifest's."""
        tensor, digest = self._checkpoint.tensors[tensor_name(module, suffix)], xxhash.xxh3_128()
        for offset in range(0, tensor.nbytes, step):
            data = bytearray(min(step, tensor.nbytes - offset))
            self._files.read_into(tensor, offset, memoryview(data))
            digest.update(data)
            yield torch.frombuffer(data, dtype=torch.uint8)
        self._compare(module, suffix, digest.hexdigest())

    def _compare(self, unit: str, suffix: str, digest: str) -> None:
        if self._units is None:
            return
        if self._record(unit).digests.get(suffix) != digest:
            name = tensor_name(unit, suffix)
            raise damaged(self._checkpoint.tensors[name].parts[0].file, name)

    def _record(self, unit: str) -> UnitRecord:
        if self._units is None or unit not in self._units:
            raise FxquantError(self._checkpoint.folder / MANIFEST, f"has no hash of {unit}.", DAMAGED)
        return self._units[unit]
