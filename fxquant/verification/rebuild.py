"""Rebuild: quantize the source again, with the kernels that a compile uses, and compare with the files."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.lowering.output_folder.layout import StoredTensor, stored_tensors
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.lowering.weights.digests import unit_on_disk
from fxquant.lowering.weights.fill import unit_anew
from fxquant.lowering.weights.producer import CheckpointProducer
from fxquant.lowering.weights.unit import Place, Unit, collect_units
from fxquant.lowering.weights.work import cores
from fxquant.program.program import Program
from fxquant.progress import Reporter
from fxquant.verification.module_check import StoredCodes
from fxquant.verification.report import Check


@dataclass(frozen=True)
class Rebuild:
    """Number of units to quantize again; None: all of them."""

    sample: int | None = None


def check_rebuild(
    program: Program, files: WeightFiles, source: Checkpoint, sample: int | None, report: Reporter
) -> Check:
    """Every unit, or `sample` of them (seeded), quantized again: all bytes must be the same. No other check need have
    passed: a tensor that is missing, or has another size, is a miss. Codes of GPTQ are taken as they are stored."""
    stored = [part for tensor in stored_tensors(program, source) for part in tensor.parts]
    units = collect_units((tensor, _place(tensor, files)) for tensor in stored)
    selected = units if sample is None or sample >= len(units) else random.Random(0).sample(units, sample)
    check = Check("rebuilt from the source ==", len(units))
    producer = CheckpointProducer(source, stamp_files(checkpoint_files(source)), StoredCodes(program, files))

    def rebuilt(unit: Unit) -> tuple[Unit, list[str]]:
        again, there = unit_anew(unit, producer), _there(unit, files)
        held = unit_on_disk(there, files.folder)
        return unit, [suffix for suffix in unit.places if again.digests[suffix] != held.digests.get(suffix)]

    with (
        report("rebuild", sum(unit.nbytes for unit in selected), "bytes") as advance,
        ThreadPoolExecutor(cores()) as pool,
    ):
        for unit, other in pool.map(rebuilt, selected):
            for suffix in other:
                check.misses.append(f"{unit.tensor_name(suffix)}: bytes differ")
            check.checked += 1
            advance(unit.nbytes)
    return check


def _place(tensor: StoredTensor, files: WeightFiles) -> Place:
    """Where it is stored, with the size it should have; nowhere if it is missing."""
    info = files.tensors.get(tensor.name)
    if info is None:
        return Place("", 0, tensor.nbytes)
    return Place(info.file.name, info.start, tensor.nbytes, tensor.runs)


def _there(unit: Unit, files: WeightFiles) -> Unit:
    """The unit without tensors that are missing or have another size."""
    infos = {suffix: files.tensors.get(unit.tensor_name(suffix)) for suffix in unit.places}
    good = (suffix for suffix, info in infos.items() if info and info.nbytes == unit.places[suffix].nbytes)
    return replace(unit, places={suffix: unit.places[suffix] for suffix in good})
