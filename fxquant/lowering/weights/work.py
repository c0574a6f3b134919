"""Weight work of an output: resume finished units, reuse unchanged ones, make the rest."""

import json
import os
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import xxhash

from fxquant.checkpoint.stamped_bytes import Stamps
from fxquant.kernels.version import KERNEL_VERSION
from fxquant.lowering.output_folder.layout import FileLayout
from fxquant.lowering.weights.digests import digests_on_disk
from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.weights.journal import Fingerprint, Journal
from fxquant.lowering.weights.local import fill_local
from fxquant.lowering.weights.producer import Producer
from fxquant.lowering.weights.ray_cluster import check_cluster, fill_ray
from fxquant.lowering.weights.reuse import Earlier, copy_units
from fxquant.lowering.weights.unit import Filled, Unit, units_of
from fxquant.progress import Reporter
from fxquant.storage.hashing import hash_text

FORMAT = 2


class WorkerKind(StrEnum):
    """Kind of worker: threads of this process, or a Ray cluster that shares the storage."""

    LOCAL = "local"
    RAY = "ray"


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """Kind, number and address of the workers. None of these changes a byte of the output."""

    kind: WorkerKind = WorkerKind.LOCAL
    jobs: int = field(default_factory=cores)
    address: str | None = None

    def check(self) -> None:
        """Raise FxquantError if these workers are not available; called before anything long begins."""
        if self.kind is WorkerKind.RAY:
            check_cluster(self.address)

    def fill(self, job: FillJob, units: Sequence[Unit]) -> Generator[Filled, None, None]:
        """Fill `units`; each is yielded when it is done, in any order."""
        if self.kind is WorkerKind.RAY:
            return fill_ray(job, units, self.jobs, self.address)
        return fill_local(job, units, self.jobs)


@dataclass
class WorkReport:
    """Bytes of weights by their origin.

    quantized  made from checkpoint weights by a recipe; copied: float tensors of the checkpoint
    reused     copied from units of an earlier output with equal keys
    resumed    finished by an earlier run of the same work
    remade     to be reused, but damaged, and therefore made again
    """

    quantized: int = 0
    copied: int = 0
    reused: int = 0
    resumed: int = 0
    remade: int = 0


@dataclass(frozen=True)
class WeightPlan:
    """Files, their units, and each unit's key."""

    files: Sequence[FileLayout]
    units: list[Unit]
    keys: dict[str, str]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(unit.nbytes for unit in self.units)


def plan_weights(files: Sequence[FileLayout], producer: Producer) -> WeightPlan:
    """The plan of all units; no weight is read."""
    units = units_of(files)
    return WeightPlan(files, units, {unit.name: producer.key(unit) for unit in units})


def fingerprint(plan: WeightPlan, version: str, policy: str, target: str, stamps: Stamps) -> Fingerprint:
    """Everything that must be equal for unfinished work to be resumed."""
    layout = xxhash.xxh3_128()
    for file in plan.files:
        layout.update(file.name.encode() + file.header)
    return {
        "format": FORMAT,
        "fxquant": version,
        "kernels": KERNEL_VERSION,
        "policy": policy,
        "target": target,
        "sources": {file.name: [s.header, s.size, s.mtime_ns] for file, s in sorted(stamps.items())},
        "layout": layout.hexdigest(),
        "units": hash_text(json.dumps(plan.keys, sort_keys=True)),
    }


def write_weights(
    plan: WeightPlan,
    producer: Producer,
    journal: Journal,
    folder: Path,
    workers: Workers,
    earlier: Earlier | None,
    report: Reporter,
) -> WorkReport:
    """Fill the reserved files of `folder`; every finished unit goes into the journal. Raises FxquantError."""
    if not journal.proven:
        _prove(plan, journal, folder, report)
    work, by_name = WorkReport(), {unit.name: unit for unit in plan.units}
    work.resumed = sum(by_name[name].nbytes for name in journal.done)
    if earlier is not None:
        _reuse(plan, producer, journal, folder, earlier, report, work)
    waiting = [unit for unit in plan.units if unit.name not in journal.done]
    filling = workers.fill(FillJob(folder.absolute(), producer), waiting)
    # closing: an error here ends the workers now, not when the generator is collected
    with report("quantize, write", sum(unit.nbytes for unit in waiting), "bytes") as advance, closing(filling):
        for filled in filling:
            journal.append(filled)
            unit = by_name[filled.name]
            if earlier is not None and unit.name in earlier.damaged:
                work.remade += unit.nbytes
            elif unit.recipe:
                work.quantized += unit.nbytes
            else:
                work.copied += unit.nbytes
            advance(unit.nbytes)
    return work


def _reuse(
    plan: WeightPlan,
    producer: Producer,
    journal: Journal,
    folder: Path,
    earlier: Earlier,
    report: Reporter,
    work: WorkReport,
) -> None:
    """Copy unchanged units. Those that turn out to be damaged are left for the workers to make again."""
    waiting = [unit for unit in plan.units if unit.name not in journal.done]
    known = [unit for unit in waiting if earlier.has(unit, plan.keys[unit.name], producer)]
    with report("reuse", sum(unit.nbytes for unit in known), "bytes") as advance:
        for unit, filled in copy_units(earlier, known, plan.files, folder):
            if filled is None:
                earlier.damaged.append(unit.name)
            else:
                journal.append(filled)
                work.reused += unit.nbytes
            advance(unit.nbytes)


def _prove(plan: WeightPlan, journal: Journal, folder: Path, report: Reporter) -> None:
    """Check the units of an earlier run: they count as finished if their bytes on disk are as they were made."""
    done = [unit for unit in plan.units if unit.name in journal.done]
    good: dict[str, Filled] = {}
    with report("check", sum(unit.nbytes for unit in done), "bytes") as advance:
        for unit, filled in digests_on_disk(done, folder):
            if filled == journal.done[unit.name]:
                good[unit.name] = filled
            advance(unit.nbytes)
    journal.prove(good)
