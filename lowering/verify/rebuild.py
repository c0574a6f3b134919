"""Make tensors from the source once more, with the kernels that a compile uses, and compare them with the files."""

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fxquant.checkpoint import Checkpoint
from fxquant.lowering.layout import StoredTensor
from fxquant.lowering.verify.report import Check
from fxquant.lowering.verify.weights import WeightFiles
from fxquant.lowering.weights.digests import unit_on_disk
from fxquant.lowering.weights.fill import unit_anew
from fxquant.lowering.weights.producer import CheckpointProducer
from fxquant.lowering.weights.unit import Place, Unit, collect_units
from fxquant.lowering.weights.work import cores
from fxquant.progress import Reporter
from fxquant.source_reader import checkpoint_files, stamp_files


@dataclass(frozen=True)
class Rebuild:
    """How many units to derive anew; None: all of them."""

    sample: int | None = None


def check_rebuild(
    stored: Sequence[StoredTensor], files: WeightFiles, source: Checkpoint, sample: int | None, report: Reporter
) -> Check:
    """Every unit, or a seeded `sample` of so many, derived again: all bytes must be the same."""
    placed = [(tensor, _place(tensor, files)) for tensor in stored if tensor.name in files.infos]
    units = collect_units(placed)
    chosen = units if sample is None or sample >= len(units) else random.Random(0).sample(units, sample)
    check = Check("rebuilt from the source ==", len(units))
    producer = CheckpointProducer(source, stamp_files(checkpoint_files(source)))

    def rebuilt(unit: Unit) -> tuple[Unit, list[str]]:
        made, held = unit_anew(unit, producer), unit_on_disk(unit, files.folder)
        return unit, [suffix for suffix in unit.places if made.digests[suffix] != held.digests[suffix]]

    with (
        report("rebuild", sum(unit.nbytes for unit in chosen), "bytes") as advance,
        ThreadPoolExecutor(cores()) as pool,
    ):
        for unit, other in pool.map(rebuilt, chosen):
            check.expect(not other, ", ".join(unit.tensor_name(suffix) for suffix in other) + ": other bytes")
            advance(unit.nbytes)
    return check


def _place(tensor: StoredTensor, files: WeightFiles) -> Place:
    info = files.infos[tensor.name]
    return Place(info.file.name, info.start, info.nbytes)
