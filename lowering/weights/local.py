"""Workers as threads of this process: kernels, hashes, reads and writes all run without the interpreter's lock."""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.weights.unit import Filled, Unit


def fill_local(job: FillJob, units: Sequence[Unit], jobs: int) -> Iterator[Filled]:
    """Fill `units` with `jobs` threads; each is yielded when it is done, in any order. The first error ends it."""
    waiting = iter(units)
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(job.fill, unit) for unit in islice(waiting, 2 * jobs)}
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                running |= {pool.submit(job.fill, unit) for unit in islice(waiting, len(finished))}
                for future in sorted(finished, key=_failed):  # what is done counts, whatever else happened
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _failed(future: Future) -> bool:
    return future.exception() is not None
