"""The weights of an output: go on with what is finished, take over what is the same, make the rest."""

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
    """Who fills the files: threads of this process, or a Ray cluster that shares the storage."""

    LOCAL = "local"
    RAY = "ray"


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Workers:
    """How many do the work, and where. No choice of them changes a byte."""

    kind: WorkerKind = WorkerKind.LOCAL
    jobs: int = field(default_factory=cores)
    address: str | None = None

    def check(self) -> None:
        """Raise FxquantError where they cannot be had; before anything long begins."""
        if self.kind is WorkerKind.RAY:
            check_cluster(self.address)

    def fill(self, job: FillJob, units: Sequence[Unit]) -> Generator[Filled, None, None]:
        """Fill `units`; each is yielded when it is done, in any order."""
        if self.kind is WorkerKind.RAY:
            return fill_ray(job, units, self.jobs, self.address)
        return fill_local(job, units, self.jobs)


@dataclass
class WorkReport:
    """Bytes of weights by how they came into the output.

    quantized  made from checkpoint weights by a recipe; copied: float tensors of the checkpoint
    reused     taken from an earlier output with equal keys
    resumed    were finished when the same work was killed
    remade     were to be reused and were damaged, so that they were made anew
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
    """Everything that is to be done; no weight is read."""
    units = units_of(files)
    return WeightPlan(files, units, {unit.name: producer.key(unit) for unit in units})


def fingerprint(plan: WeightPlan, version: str, policy: str, target: str, stamps: Stamps) -> Fingerprint:
    """What must be the same for unfinished work to go on."""
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
    """Take over what is the same. What turns out to be damaged is left for the workers to make anew."""
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
    """Units of an earlier run count as finished if their bytes are on the disk as they were made."""
    done = [unit for unit in plan.units if unit.name in journal.done]
    good: dict[str, Filled] = {}
    with report("check", sum(unit.nbytes for unit in done), "bytes") as advance:
        for unit, filled in digests_on_disk(done, folder):
            if filled == journal.done[unit.name]:
                good[unit.name] = filled
            advance(unit.nbytes)
    journal.prove(good)
