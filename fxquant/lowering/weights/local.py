"""Local workers, threads of this process: kernels, hashes, reads and writes all release the GIL."""

from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice

from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.weights.unit import Filled, Unit


def fill_local(job: FillJob, units: Sequence[Unit], jobs: int) -> Generator[Filled, None, None]:
    """Fill `units` with `jobs` threads; each is yielded when it is done, in any order. The first error ends the work.

    The same number of units is queued, so that the disk already reads them ahead.
    """
    waiting = iter(units)

    def submitted(count: int) -> set[Future[Filled]]:
        taken = list(islice(waiting, count))
        for unit in taken:
            job.producer.prefetch(unit)
        return {pool.submit(job.fill, unit) for unit in taken}

    with ThreadPoolExecutor(jobs) as pool:
        running = submitted(2 * jobs)
        try:
            while running:
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                running |= submitted(len(finished))
                for future in sorted(finished, key=_failed):  # errors last: finished units still reach the journal
                    yield future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _failed(future: Future) -> bool:
    return future.exception() is not None
