"""How fast this machine is at what `compile` does, measured for a second beside other work.

python -m fxquant.machine FOLDER prints the measurement as JSON. Nothing here imports torch.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

DISK_BYTES = 64 << 20
DISK_SECONDS = 0.5
"""Bytes to write and read, and when to stop before them."""
BLOCK = (256, 7168)
"""Rows and columns of the weight that kernels are timed on."""
KERNEL_SECONDS = 0.1
COPY = "copy"
KERNELS = ((False, 0), (True, 0), (True, 256))
"""Four bits or eight, and the group size; 0: one scale a channel."""
PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Machine:
    """Disk rates are in GB/s, 10**9 bytes a second.

    cores         that a process may use
    kernels       as `kernel_rates` gives them, of one core
    disk_read     of the folder measured, past the page cache where the system lets go of it; None: not measured
    disk_write    with fsync
    disk_unknown  why there is no disk rate, "" where there is
    kernel_bytes  memory that importing and compiling the kernels takes
    peak_bytes    resident memory of the measuring process at its largest
    """

    cores: int
    kernels: dict[str, float]
    disk_read: float | None
    disk_write: float | None
    disk_unknown: str
    kernel_bytes: int
    peak_bytes: int


def kernel_name(int4: bool, group_size: int, fp8: bool) -> str:
    """Which of the kernels of `kernel_rates` a weight takes; FP8 is decoded on the way, 16 bits stand for the rest."""
    return f"{'int4' if int4 else 'int8'}{' groups' if int4 and group_size else ''} of {'fp8' if fp8 else 'bf16'}"


def kernel_rates() -> dict[str, float]:
    """Kernel → 10**9 weights a second, or for `COPY` 10**9 bytes, on one core."""
    import numpy as np

    weight = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    copy = np.empty_like(weight)

    def int8() -> None:
        np.rint(weight / (np.abs(weight).max(1, keepdims=True) / 127)).astype(np.int8)

    rates = {COPY: weight.nbytes / best_seconds(lambda: np.copyto(copy, weight)) / 1e9}
    rate = weight.size / best_seconds(int8) / 1e9
    return rates | {kernel_name(*kernel, fp8): rate for kernel in KERNELS for fp8 in (False, True)}


def best_seconds(work: Callable[[], object], limit: float = KERNEL_SECONDS) -> float:
    """The shortest of the runs that fit in `limit` seconds, after one that does not count."""
    work()
    best, end = float("inf"), time.perf_counter() + limit
    while best == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def disk_rates(folder: Path) -> tuple[float, float]:
    """GB/s of reading and of writing in `folder`, or above it where it is not there yet. Raises OSError."""
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    block = os.urandom(1 << 20) * 4
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


def measure(folder: Path) -> Machine:
    """This machine, and the disk of `folder`."""
    unknown, read, write = "", None, None
    try:
        read, write = disk_rates(folder)
    except OSError as error:
        unknown = f"{folder} cannot be written: {error.strerror}"
    before = resident_bytes()
    kernels = kernel_rates()
    return Machine(
        len(os.sched_getaffinity(0)), kernels, read, write, unknown, resident_bytes() - before, peak_bytes()
    )


def resident_bytes() -> int:
    """Memory of this process that is in RAM now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes() -> int:
    """The most that it ever was."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Measuring:
    """`measure(folder)` in a process of its own, beside what is done inside the `with`; it ends with it."""

    def __init__(self, folder: Path) -> None:
        path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fxquant.machine", str(folder)], stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": path}, text=True,
        )  # fmt: skip

    def __enter__(self) -> "Measuring":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.communicate()

    def result(self) -> Machine:
        """Waits for it. Raises RuntimeError with what the process said if it failed."""
        answer, errors = self._process.communicate()
        if self._process.returncode:
            raise RuntimeError(f"measuring this machine failed:\n{errors}")
        return Machine(**json.loads(answer))


if __name__ == "__main__":
    print(json.dumps(asdict(measure(Path(sys.argv[1])))))
