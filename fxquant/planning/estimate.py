"""How long `compile` takes and how much memory, with the arithmetic that says so.

seconds = max(bytes in / disk read + bytes out / disk write, sum of work / rate / workers) + fixed
memory  = base + kernels + workers × (PER_WORKER_BYTES + what is whole in memory)
"""

from dataclasses import dataclass

from fxquant.planning.host_benchmark import Machine

PER_WORKER_BYTES = 16 << 20
"""Buffers of one worker: a row block of about 2 MiB of source, what is made of it, and the allocator's share. No tensor
is in memory whole, but one that rotation turns over its rows."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    base     of this process when the graph is rewritten and the files are laid out
    kernels  what compiled kernels and their compiler take, as measured
    """

    base: int
    kernels: int
    workers: int
    per_worker: int = PER_WORKER_BYTES

    @property
    def peak(self) -> int:
        return self.base + self.kernels + self.workers * self.per_worker


@dataclass(frozen=True)
class Estimate:
    """Seconds.

    read, write  of all bytes, None where the disk is not known
    compute      kernel → seconds of all workers together, None where its rate is not known
    fixed        opening, tracing, passes and layout, as they took now
    """

    workers: int
    read: float | None
    write: float | None
    compute: dict[str, float | None]
    fixed: float

    @property
    def disk(self) -> float | None:
        return None if self.read is None or self.write is None else self.read + self.write

    @property
    def computing(self) -> float:
        """What is known of it."""
        return sum(seconds or 0.0 for seconds in self.compute.values())

    @property
    def complete(self) -> bool:
        """Whether all rates were known; if not, `total` is the least that it takes."""
        return self.disk is not None and None not in self.compute.values()

    @property
    def total(self) -> float:
        return max(self.disk or 0.0, self.computing) + self.fixed


def estimate(
    bytes_in: int, bytes_out: int, work: dict[str, int], machine: Machine, jobs: int | None, fixed: float
) -> Estimate:
    """`work`: kernel → weights it quantizes, or bytes it copies; more workers than cores are no faster."""
    workers = min(jobs or machine.cores, machine.cores)
    return Estimate(
        workers=workers,
        read=_seconds(bytes_in, machine.disk_read),
        write=_seconds(bytes_out, machine.disk_write),
        compute={kernel: _seconds(amount, machine.kernels.get(kernel), workers) for kernel, amount in work.items()},
        fixed=fixed,
    )


def _seconds(amount: int, rate: float | None, workers: int = 1) -> float | None:
    """`rate` in 10**9 a second."""
    return None if rate is None else amount / rate / 1e9 / workers
