"""Host benchmark: disk and kernel rates of this machine, measured in a separate process for about a second.

python -m fxquant.planning.host_benchmark FOLDER PARENT prints the measurement as JSON, and ends with process PARENT.
Nothing here imports torch; `gptq_rates` does, and is imported only for a policy with GPTQ.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from fxquant.processes.command import end_with
from fxquant.processes.memory import peak_bytes, resident_bytes

if TYPE_CHECKING:
    from fxquant.kernels.decode import EncodedRows

DISK_BYTES = 64 << 20
DISK_SECONDS = 0.5
"""Bytes to write and read, and seconds after which either stops early."""
BLOCK = (1024, 7168)
"""Rows and columns of the weight that kernels are timed on: larger than caches."""
SEARCHED_ROWS = 128
"""Rows for kernels that search for scales: these are slow, and their rows stay in cache in any case."""
GROUP_SIZE, FP8_BLOCK = 256, 128
MIN_MAX = "min_max"
"""The weight algorithm (`fxquant.schemes.schemes`) whose kernels have no name of their own."""
KERNEL_SECONDS = 0.08
SECONDS, LAST_WAIT = 4.0, 4.0
"""Seconds to measure, from the start and from the ask: enough unless kernels are compiled for the first time, which
takes ten seconds. Kernels that search for scales begin at the ask, which comes after tracing, late for large ones."""
COPY, COPY_BYTES = "copy", 64 << 20
GPTQ_INVERSE, GPTQ_FEEDBACK = "inverses for gptq", "codes by gptq"
GPTQ = {GPTQ_INVERSE, GPTQ_FEEDBACK}
GPTQ_SECONDS = 4.0
"""How much longer to measure where GPTQ is asked for: it runs in torch."""
PACKAGE = str(Path(__file__).parents[2])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Disk rates are in GB/s, 10**9 bytes per second.

    cores         that a process may use
    kernels       rates of one core, as from `kernel_rates`; kernels that were not measured in time are absent
    disk_read     of the measured folder, without the page cache if the system drops it; None: not measured
    disk_write    with fsync
    disk_unknown  why there is no disk rate, "" if there is
    kernel_bytes  memory that importing and compiling the kernels takes
    peak_bytes    resident memory of the measuring process at its largest
    """

    cores: int
    kernels: dict[str, float] = field(default_factory=dict)
    disk_read: float | None = None
    disk_write: float | None = None
    disk_unknown: str = "not measured in time"
    kernel_bytes: int = 0
    peak_bytes: int = 0


def kernel_name(bits: int, group_size: int, fp8: bool, algorithm: str = MIN_MAX) -> str:
    """Kernel of `kernel_rates` for a weight of `bits`; FP8 is decoded on the way, 16 bits stand for other dtypes."""
    form = f"int{bits}{' groups' if group_size else ''}"
    return f"{form}{'' if algorithm == MIN_MAX else f' {algorithm}'} of {'fp8' if fp8 else 'bf16'}"


def kernel_rates(kernels: dict[str, Callable[[], object]], rows: int = BLOCK[0]) -> Iterator[tuple[str, float]]:
    """Kernel and 10**9 weights per second on one core; each call takes `rows` rows."""
    for name, work in kernels.items():
        yield name, rows * BLOCK[1] / best_seconds(work) / 1e9


def copy_rate() -> float:
    """GB/s that one core copies from memory to memory."""
    import numpy as np

    original = np.ones(COPY_BYTES, np.uint8)
    copy = np.empty_like(original)
    return original.nbytes / best_seconds(lambda: np.copyto(copy, original)) / 1e9


def block_sources(n: int) -> "dict[bool, EncodedRows]":
    """Whether FP8 → n random rows, with the types that `compile` uses."""
    import numpy as np

    from fxquant.kernels.decode import EncodedRows
    from fxquant.kernels.rounding import BFLOAT16, FLOAT8

    generator, k = np.random.default_rng(0), BLOCK[1]
    bits = generator.standard_normal((n, k), np.float32).view(np.uint32) >> 16
    bf16 = bits.astype(np.uint16).view(np.uint8)
    fp8 = generator.integers(0, 0x78, (n, k), np.uint8)
    scales = np.full((-(-n // FP8_BLOCK), k // FP8_BLOCK), 0.01, np.float32)
    nothing = np.empty((0, 0), np.float32), np.empty(0, np.float32)
    # numba compiles a variant for read-only arrays: the one that `compile` runs
    for array in (bf16, fp8, scales, *nothing):
        array.flags.writeable = False
    return {
        False: EncodedRows(bf16, BFLOAT16, 0, nothing[0], FP8_BLOCK, FP8_BLOCK, nothing[1], nothing[1], BFLOAT16),
        True: EncodedRows(fp8, FLOAT8, 0, scales, FP8_BLOCK, FP8_BLOCK, nothing[1], nothing[1], BFLOAT16),
    }


def block_kernels() -> dict[str, Callable[[], object]]:
    """Kernel → a call on random weights of `BLOCK`, with the types that `compile` calls it with."""
    return _calls(BLOCK[0], searches=False)


def searched_kernels() -> dict[str, Callable[[], object]]:
    """The same on `SEARCHED_ROWS` rows, for algorithms that search for scales."""
    return _calls(SEARCHED_ROWS, searches=True)


def _calls(n: int, searches: bool) -> dict[str, Callable[[], object]]:
    import numpy as np

    from fxquant.kernels.rounding import FLOAT32
    from fxquant.kernels.search import ROW_KERNELS

    k = BLOCK[1]
    codes, scale, sums = np.empty((n, k), np.int8), np.empty(n, np.float32), np.empty(n, np.int64)
    seconds = {size: np.empty((n, k // size if size else 0), np.float32) for size in (0, GROUP_SIZE)}
    bias = np.empty((n, 1), np.float32)
    calls: dict[str, Callable[[], object]] = {}
    for algorithm, kernels in ROW_KERNELS.items():
        if kernels.searches is not searches:
            continue
        for fp8, rows in block_sources(n).items():
            given = rows, FLOAT32, *kernels.options
            for bits, work in kernels.by_bits.items():
                if bits != 4:
                    calls[kernel_name(bits, 0, fp8, algorithm)] = partial(work, *given, codes, scale, sums)
                    continue
                for size, second in seconds.items():
                    call = partial(work, *given, codes[: n // 2], scale, second, bias)
                    calls[kernel_name(bits, size, fp8, algorithm)] = call
    return calls


def best_seconds(work: Callable[[], object], limit: float = KERNEL_SECONDS) -> float:
    """The shortest of the runs that fit in `limit` seconds, after one that does not count."""
    work()  # compiles the kernel, if it is not yet
    best, end = float("inf"), time.perf_counter() + limit
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def disk_rates(folder: Path) -> tuple[float, float]:
    """GB/s of reading and of writing in `folder`, or in the nearest existing folder above it. Raises OSError."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    block = os.urandom(1 << 20) * 4  # a file system may compress or skip zeros
    with tempfile.TemporaryFile(dir=place, prefix=".fxquant-") as file:
        handle, written, start = file.fileno(), 0, time.perf_counter()
        while written < DISK_BYTES and (not written or time.perf_counter() - start < DISK_SECONDS):
            written += os.write(handle, block)
        os.fsync(handle)
        write = written / (time.perf_counter() - start)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        done, start = 0, time.perf_counter()
        while done < written and (not done or time.perf_counter() - start < DISK_SECONDS):
            done += len(os.pread(handle, len(block), done))
        return done / (time.perf_counter() - start) / 1e9, write / 1e9


def measure(folder: Path, asked: Callable[[], list[str]] = list) -> Iterator[Machine]:
    """Yield what is known of this machine, and of the disk of `folder`, after each step.

    `asked`, called last: which kernels are needed; those that search for scales are measured only if they are.
    """
    machine = Machine(cores=len(os.sched_getaffinity(0)))
    try:
        read, write = disk_rates(folder)
        machine = replace(machine, disk_read=read, disk_write=write, disk_unknown="")
    except OSError as error:
        machine = replace(machine, disk_unknown=f"{folder} cannot be written: {error.strerror}")
    yield machine
    machine = replace(machine, kernels={COPY: copy_rate()})
    yield machine
    before = resident_bytes()

    for name, rate in kernel_rates(block_kernels()):
        machine = _learned(machine, name, rate, before)
        yield machine
    names = [name for name in asked() if name not in machine.kernels]
    searched = searched_kernels() if names else {}
    for name, rate in kernel_rates({name: searched[name] for name in names if name in searched}, SEARCHED_ROWS):
        machine = _learned(machine, name, rate, before)
        yield machine
    if not GPTQ.isdisjoint(names):
        from fxquant.planning.gptq_rates import gptq_calls

        for name, (units, work) in zip((GPTQ_INVERSE, GPTQ_FEEDBACK), gptq_calls(), strict=True):
            # kernel_bytes stays: the memory is torch's, which `compile` has anyway
            machine = replace(machine, kernels=machine.kernels | {name: units / best_seconds(work) / 1e9})
            yield machine


def _learned(machine: Machine, name: str, rate: float, before: int) -> Machine:
    """`before`: memory without kernels."""
    taken, kernels = resident_bytes() - before, machine.kernels | {name: rate}
    return replace(machine, kernels=kernels, kernel_bytes=taken, peak_bytes=peak_bytes())


class Measuring:
    """`measure(folder)` in a separate process, while the body of the `with` runs; it ends with it."""

    def __init__(self, folder: Path, seconds: float = SECONDS) -> None:
        # -P keeps out the current folder, from which fxquant may run without being installed
        path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
        self._end = time.monotonic() + seconds
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fxquant.planning.host_benchmark", str(folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": path},
            text=True,
        )

    def __enter__(self) -> "Measuring":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()  # reaps it and closes its pipes

    def result(self, kernels: Iterable[str] = ()) -> Machine:
        """What was measured within `seconds` from the start; waits at least `LAST_WAIT` however late it is called.

        `kernels`: those needed; kernels that search for scales are measured only if they are. Raises RuntimeError with
        the output of the process if it failed.
        """
        names = list(kernels)
        left = self._end + (0 if GPTQ.isdisjoint(names) else GPTQ_SECONDS) - time.monotonic()
        try:
            answer, errors = self._process.communicate(json.dumps(names), timeout=max(left, LAST_WAIT))
        except subprocess.TimeoutExpired:
            self._process.kill()
            answer, errors = self._process.communicate()
        if self._process.returncode > 0:
            raise RuntimeError(f"measuring this machine failed:\n{errors}")
        # a process killed in a write leaves half a line
        lines = [line for line in answer.splitlines(keepends=True) if line.endswith("\n")]
        return Machine(**json.loads(lines[-1])) if lines else Machine(cores=len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    end_with(int(sys.argv[2]))
    os.nice(5)  # what it runs beside comes first; the best of several runs is what counts here
    for known in measure(Path(sys.argv[1]), lambda: json.loads(sys.stdin.read() or "[]")):
        print(json.dumps(asdict(known)), flush=True)
