"""Workers on the machines of a Ray cluster that share the storage of source and output."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from fxquant.errors import FxquantError
from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.weights.unit import Filled, Unit

TASK_BYTES = 64 << 20
"""Output bytes of one Ray task, or one unit where that is larger: a task costs a millisecond or so."""
TASKS_PER_CORE = 2
NEVER = -1


def fill_ray(job: FillJob, units: Sequence[Unit], jobs: int, address: str | None) -> Iterator[Filled]:
    """Fill `units` on the cluster at `address`; None: on one of `jobs` cores, started here and ended afterwards.

    Ray runs the tasks of a dead worker or machine again; a task that runs twice writes the same bytes. No more tasks
    wait than keep the cluster busy.
    """
    ray = _ray()
    started = not ray.is_initialized()
    if started:
        _connect(ray, jobs, address)
    try:
        yield from _fill(ray, job, units)
    finally:
        if started:
            ray.shutdown()


def _fill(ray: Any, job: FillJob, units: Sequence[Unit]) -> Iterator[Filled]:
    shared, fill = ray.put(job), ray.remote(max_retries=NEVER)(_fill_some)
    waiting = iter(_tasks(units))
    limit = max(TASKS_PER_CORE * int(ray.cluster_resources().get("CPU", 1)), TASKS_PER_CORE)
    running = [fill.remote(shared, task) for task in islice(waiting, limit)]
    while running:
        finished, running = ray.wait(running)
        running += [fill.remote(shared, task) for task in islice(waiting, len(finished))]
        for one in finished:
            try:
                yield from ray.get(one)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None


def _fill_some(job: FillJob, units: list[Unit]) -> list[Filled]:
    return [job.fill(unit) for unit in units]


def _tasks(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    task: list[Unit] = []
    for unit in units:
        task.append(unit)
        if sum(one.nbytes for one in task) >= TASK_BYTES:
            yield task
            task = []
    if task:
        yield task


def _connect(ray: Any, jobs: int, address: str | None) -> None:
    try:
        cores = {"num_cpus": jobs} if address is None else {}
        ray.init(address=address or "local", log_to_driver=False, configure_logging=False, **cores)
    except (ConnectionError, ValueError, RuntimeError) as error:
        fact = f"no Ray cluster answers: {str(error).strip().splitlines()[0]}"
        raise FxquantError(f"--address {address}", fact, "ray status shows one.") from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise FxquantError("--engine ray", "Ray is not installed.", "pip install 'fxquant[ray]'") from None
    return ray
