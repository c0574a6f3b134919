"""File checks: the files of an output against its manifest, and the target of an output without one."""

from pathlib import Path

from fxquant.engines.documents import group_size
from fxquant.engines.table import DEFAULT, ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.manifest import MANIFEST, Manifest, file_sizes
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.lowering.weights.digests import digests_on_disk, file_digest
from fxquant.lowering.weights.unit import Place, Unit
from fxquant.program.program import Program
from fxquant.progress import Reporter
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.hashing import hash_bytes
from fxquant.storage.safetensors import header_bytes
from fxquant.storage.sliced_tensor import SlicedTensor
from fxquant.verification.report import Check

ONNX_GRAPH = "model.onnx"


def check_sizes(manifest: Manifest, folder: Path) -> Check:
    """Every file that was written exists, with its size."""
    check = Check("files: present, size", len(manifest.files))
    sizes = file_sizes(folder)
    for name, size in manifest.files.items():
        check.expect(sizes.get(name) == size, f"{name}: size {sizes.get(name, 'missing')}, written with {size}")
    return check


def check_digests(manifest: Manifest, folder: Path, report: Reporter, program: Program | None = None) -> Check:
    """Every existing file has the bytes that were written: documents whole, weights tensor by tensor.

    `program`: that of the folder, which says where experts are in stacks.
    """
    check = Check("files: digest", len(manifest.digests) + len(manifest.weights) + len(manifest.units))
    present = file_sizes(folder)
    for name, digest in manifest.digests.items():
        held = file_digest(folder / name) if name in present else "missing"
        check.expect(held == digest, f"{name}: XXH3 {held[:16]}, written with {digest[:16]}")
    for name, digest in manifest.weights.items():
        held = hash_bytes(header_bytes(folder / name)) if name in present else "missing"
        check.expect(held == digest, f"{name}: header's XXH3 {held[:16]}, written with {digest[:16]}")
    units = _units_on_disk(manifest, WeightFiles(folder, program))
    with report("verify digests", sum(unit.nbytes for unit in units), "bytes") as advance:
        for unit, filled in digests_on_disk(units, folder):
            written = manifest.units[unit.name].digests
            misses = [
                _other_bytes(unit, suffix, filled.digests.get(suffix, "missing"), digest)
                for suffix, digest in written.items()
                if filled.digests.get(suffix) != digest
            ]
            check.expect(not misses, "; ".join(misses))
            advance(unit.nbytes)
    return check


def _other_bytes(unit: Unit, suffix: str, held: str, written: str) -> str:
    place = unit.places.get(suffix)
    if place is None:
        return f"{MANIFEST}: {unit.tensor_name(suffix)} is in no weight file"
    return f"{place.file}: {unit.tensor_name(suffix)}: XXH3 {held[:16]}, written with {written[:16]}"


def _units_on_disk(manifest: Manifest, files: WeightFiles) -> list[Unit]:
    """The manifest's units with the places where the files' headers have their tensors."""
    units = [Unit(name, None, None, {}) for name in manifest.units]
    for unit in units:
        for suffix in manifest.units[unit.name].digests:
            info = files.tensors.get(unit.tensor_name(suffix))
            if info is not None:
                runs = info.runs if isinstance(info, SlicedTensor) else None
                unit.places[suffix] = Place(info.file.name, info.start, info.nbytes, runs)
    return units


def infer_target(program: Program, folder: Path) -> Target:
    """The only target that writes such weights under such names. Raises FxquantError if several or none do."""
    targets = [target for target in Target if _could_be(target, program, folder)]
    if len(targets) == 1:
        return targets[0]
    choice = " or ".join(targets) or "no target"
    way_out = f"Name the target: --target {targets[0] if targets else DEFAULT}."
    raise FxquantError(folder, f"has no manifest, and its files fit {choice}.", way_out)


def _could_be(target: Target, program: Program, folder: Path) -> bool:
    engine = ENGINES[target]
    weight_formats = {recipe.weight_format for recipe in program.recipes.values()}
    weights = (folder / engine.file_name(1, 1)).is_file() or (folder / engine.index).is_file()
    return (
        weight_formats
        <= {engine.weight_format(group_size(program)), *([] if engine.npu_graph else [WeightFormat.BLOCKS])}
        and engine.npu_graph != (folder / ONNX_GRAPH).is_file()
        and (folder / engine.description).is_file()
        and weights
    )
