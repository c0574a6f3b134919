"""A million cases: processes forked from one that has imported everything, watched from outside, and the table."""

import json
import mmap
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from forked import renew_threads

from fuzzing.guard import SECONDS, Guard, limit_memory
from fuzzing.mutators import Mutator
from fuzzing.targets import Target, make_case
from fuzzing.worker import HANG, KINDS, TRACEBACK, Finding, run_cases

CHUNKS = 40
"""Into so many processes the cases of a target are dealt out, at most, so that memory is measured often."""
SMALLEST_CHUNK = 200
GRACE = 5
"""Seconds after `SECONDS` until a process that does not answer is killed."""
SHARED_MEMORY = Path("/dev/shm")


@dataclass
class Row:
    """What one target's cases came to."""

    counts: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    memory: int = 0
    seconds: float = 0.0


@dataclass
class Chunk:
    """Cases of one process; `shared` holds the number of the case that it is at and when that began."""

    target: Target
    cases: range
    shared: mmap.mmap = field(default_factory=lambda: mmap.mmap(-1, 16))
    process: int = 0
    result: Path = Path()
    began: float = 0.0

    def note(self, index: int) -> None:
        self.shared[:16] = struct.pack("<qd", index, time.monotonic())

    def at(self) -> tuple[int, float]:
        return struct.unpack("<qd", self.shared[:16])


class Campaign:
    """Cases of `targets` from `seed`, in `jobs` processes at a time.

    sound  the seeds are good files: each process reads them first, because where that fails no case says anything
    """

    def __init__(
        self, base: Path, targets: Sequence[Target], cases: int, jobs: int, seed: int, sound: bool = True
    ) -> None:
        self.base, self.jobs, self.seed, self.sound = base, jobs, seed, sound
        total = sum(target.cases for target in targets)
        self.shares = {target.name: -(-target.cases * cases // total) for target in targets}
        self.targets = {target.name: target for target in targets}
        self.mutators: dict[str, dict[str, Mutator]] = {
            target.name: target.mutators(base / "seeds") for target in targets
        }
        self.rows = {target.name: Row() for target in targets}
        self.stopped = False

    def run(self) -> None:
        """Until all cases are done."""
        warm = Path(shutil.copytree(self.base / "seeds", self.base / "warm"))
        for target in self.targets.values():
            target.read(warm / target.seed)  # what it imports and compiles, every child has
        shutil.rmtree(warm)
        waiting, running = list(self._chunks())[::-1], list[Chunk]()
        try:
            self._run(waiting, running)
        except KeyboardInterrupt:  # the rows are those of what was done
            self.stopped = True
            for chunk in running:
                os.kill(chunk.process, signal.SIGKILL)
                os.waitpid(chunk.process, 0)

    def _run(self, waiting: list[Chunk], running: list[Chunk]) -> None:
        while waiting or running:
            while waiting and len(running) < self.jobs:
                running.append(self._start(waiting.pop()))
            time.sleep(0.05)
            for chunk in list(running):
                if (left := self._look(chunk)) is not None:
                    running.remove(chunk)
                    waiting += [Chunk(chunk.target, left)] if left else []

    def _chunks(self) -> Iterator[Chunk]:
        """Interleaved, so that a run that is stopped has something of all."""
        parts = {}
        for name, count in self.shares.items():
            size = max(SMALLEST_CHUNK, -(-count // CHUNKS))
            parts[name] = [range(first, min(first + size, count)) for first in range(0, count, size)]
        for turn in range(CHUNKS):
            for name, ranges in parts.items():
                if turn < len(ranges):
                    yield Chunk(self.targets[name], ranges[turn])

    def _start(self, chunk: Chunk) -> Chunk:
        folder = Path(tempfile.mkdtemp(dir=self.base))
        chunk.result, chunk.began = folder / "result.json", time.monotonic()
        chunk.note(chunk.cases.start)
        sys.stdout.flush()
        chunk.process = os.fork()
        if chunk.process == 0:
            status = 1
            try:
                self._work(chunk, folder)
                status = 0
            finally:
                os._exit(status)
        return chunk

    def _work(self, chunk: Chunk, folder: Path) -> None:
        """In the child."""
        renew_threads()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        log = os.open(folder / "stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        seeds = self.base / "seeds"
        case = Path(shutil.copytree(seeds / chunk.target.seed, folder / "case" / chunk.target.seed))
        for other in ("checkpoint", "texts"):
            if chunk.target.seed != other:
                (folder / "case" / other).symlink_to(seeds / other)
        os.chdir(folder / "case")
        if self.sound:
            chunk.target.read(case)
        guard = Guard(folder / "case")
        limit_memory()
        guard.install()
        name = chunk.target.name
        tally = run_cases(chunk.target, case, self.mutators[name], self.seed, chunk.cases, guard, chunk.note)
        document = {
            "counts": tally.counts,
            "memory": tally.memory,
            "findings": [asdict(finding) for finding in tally.findings],
        }
        chunk.result.write_text(json.dumps(document))

    def _look(self, chunk: Chunk) -> range | None:
        """None while it runs; then what is left of its cases: nothing, or those after one that killed it."""
        ended, status = os.waitpid(chunk.process, os.WNOHANG)
        index, since = chunk.at()
        killed = not ended and time.monotonic() - since > SECONDS + GRACE
        if not ended and not killed:
            return None
        if killed:
            with suppress(ProcessLookupError):
                os.kill(chunk.process, signal.SIGKILL)
            os.waitpid(chunk.process, 0)
        left = range(0)
        row = self.rows[chunk.target.name]
        row.seconds += time.monotonic() - chunk.began
        if not killed and status == 0:
            document = json.loads(chunk.result.read_text())
            row.counts.update(document["counts"])
            row.memory = max(row.memory, document["memory"])
            row.findings += [Finding(**finding) for finding in document["findings"]]
        else:
            self._lost(chunk, index, HANG if killed else TRACEBACK, f"the process ended with status {status}")
            left = range(index + 1, chunk.cases.stop)
        shutil.rmtree(chunk.result.parent, ignore_errors=True)
        return left

    def _lost(self, chunk: Chunk, index: int, kind: str, fact: str) -> None:
        """A case that took its process with it, made once more from its number."""
        name, row = chunk.target.name, self.rows[chunk.target.name]
        file, data = make_case(self.mutators[name], Random(f"{self.seed} {name} {index}"))
        log = (chunk.result.parent / "stderr").read_text(errors="replace")[-600:]
        row.counts[kind] += 1
        row.counts["accepted"] += index - chunk.cases.start  # those before it ended in silence
        row.findings.append(Finding(name, file, b64encode(data).decode(), kind, f"{fact}: {log}", "process", index))


def table(rows: dict[str, Row]) -> str:
    """Markdown: a line a target, and their sum."""
    head = ("target", "cases", *KINDS, "largest MB", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    total = Row()
    for name, row in rows.items():
        lines.append(_line(name, row))
        total.counts.update(row.counts)
        total.memory, total.seconds = max(total.memory, row.memory), total.seconds + row.seconds
    return "\n".join([*lines, _line("**all**", total)])


def _line(name: str, row: Row) -> str:
    counts = [f"{row.counts[kind]:,}" for kind in KINDS]
    cells = [name, f"{sum(row.counts.values()):,}", *counts, f"{row.memory / 1e6:,.0f}", f"{row.seconds:,.0f}"]
    return "| " + " | ".join(cells) + " |"
