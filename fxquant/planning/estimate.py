"""Time and memory estimate of `compile`:

seconds = max(bytes in / disk read + bytes out / disk write, sum of work / rate / workers) + fixed
memory  = base + kernels + workers × (PER_WORKER_BYTES + what is whole in memory)
"""

from dataclasses import dataclass

from fxquant.planning.host_benchmark import Machine

PER_WORKER_BYTES = 16 << 20
"""Buffers of one worker: a row block of about 2 MiB of source, its results, and the allocator's share. No tensor is in
memory whole, except one whose rows rotation mixes."""


@dataclass(frozen=True)
class Memory:
    """Bytes.

    base     this process after rewriting the graph and laying out the files
    kernels  compiled kernels and their compiler, as measured
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

    read, write  of all bytes, None if the disk's rate is unknown
    compute      kernel → seconds of all workers together, None if its rate is unknown
    fixed        opening, tracing, passes and layout, as measured in this run
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
        """Sum over the kernels whose rate is known."""
        return sum(seconds or 0.0 for seconds in self.compute.values())

    @property
    def complete(self) -> bool:
        """Whether all rates were known; if not, `total` is a lower bound."""
        return self.disk is not None and None not in self.compute.values()

    @property
    def total(self) -> float:
        # max, not sum: while one worker waits for the disk, others compute
        return max(self.disk or 0.0, self.computing) + self.fixed


def estimate(
    bytes_in: int, bytes_out: int, work: dict[str, int], machine: Machine, jobs: int | None, fixed: float
) -> Estimate:
    """`work`: kernel → weights it quantizes, or bytes it copies; more workers than cores do not help."""
    workers = min(jobs or machine.cores, machine.cores)
    return Estimate(
        workers=workers,
        read=_seconds(bytes_in, machine.disk_read),
        write=_seconds(bytes_out, machine.disk_write),
        compute={kernel: _seconds(amount, machine.kernels.get(kernel), workers) for kernel, amount in work.items()},
        fixed=fixed,
    )


def _seconds(amount: int, rate: float | None, workers: int = 1) -> float | None:
    """`rate` in 10**9 per second."""
    return None if rate is None else amount / rate / 1e9 / workers
