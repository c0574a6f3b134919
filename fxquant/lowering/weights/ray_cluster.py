"""Ray workers, on the machines of a cluster that share the storage of source and output.

Every machine needs the same Python, Ray and fxquant; a path names the same file on all of them.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from fxquant.errors import FxquantError, StoppedError
from fxquant.kernels.version import KERNEL_VERSION
from fxquant.lowering.weights.fill import FillJob
from fxquant.lowering.weights.ray_head import own_cluster, own_token
from fxquant.lowering.weights.unit import Filled, Unit
from fxquant.processes.command import run_to_end
from fxquant.version import __version__

TASK_BYTES = 64 << 20
"""Output bytes of one Ray task, or one unit if that is larger: a task costs about a millisecond."""
TASKS_PER_CORE = 2
SHARES_PER_CORE = 8
"""Tasks per core of a small model, so that all cores have work until the end."""
NEVER = -1
"""For max_retries: Ray never stops retrying a task whose worker died."""
ANSWER_SECONDS = 5
CONNECT_SECONDS = 60
CANCEL_SECONDS = 10
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); ray.shutdown()"
VERSIONS = (__version__, KERNEL_VERSION)
REMEDY = "Start one with ray start --head, set RAY_AUTH_MODE=token if it has a token, or leave --address out."


def fill_ray(job: FillJob, units: Sequence[Unit], jobs: int, address: str | None) -> Generator[Filled, None, None]:
    """Fill `units` on the cluster at `address`; None: on a cluster of `jobs` cores, started here and ended afterwards.

    Ray runs the tasks of a dead worker or machine again; a task that runs twice writes the same bytes. Only as many
    tasks are queued as keep the cluster busy. A process that is already connected to a cluster uses that one. Output
    printed meanwhile goes to stderr: Ray prints which machine it lost, and stdout may carry JSON.
    """
    ray = _ray()
    stays = ray.is_initialized()
    with redirect_stdout(sys.stderr), nullcontext() if stays else _connected(ray, jobs, address):
        try:
            yield from _fill(ray, job, units, stays)
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, FxquantError) else error) from None
        except ray.exceptions.RayError as error:
            fact = f"the cluster failed: {_first_line(error)}"
            raise StoppedError("--workers ray", fact, "Check its machines with ray status.") from None


def check_cluster(address: str | None) -> None:
    """Raise FxquantError if Ray is not installed, or no cluster answers at `address` within a minute.

    The attempt runs in a separate process: Ray itself waits longer, and writes its own messages to the terminal.
    """
    _ray()
    if address is None:
        return
    place = f"--address {address}"
    if address != "auto":
        _reach(address, place)
    try:
        command = [sys.executable, "-c", PROBE, address]
        done = run_to_end(command, CONNECT_SECONDS)
    except TimeoutError:
        fact = f"no Ray cluster answers in {CONNECT_SECONDS} seconds."
        raise FxquantError(place, fact, REMEDY) from None
    if done.status:
        raise FxquantError(place, f"no Ray cluster answers: {_without_type(done.last_line)}", REMEDY)


def _reach(address: str, place: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise FxquantError(place, "not the address of a Ray cluster.", "Write auto, or HOST:PORT such as head:6379.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FxquantError(place, f"no Ray cluster answers: {reason}.", REMEDY) from None


@contextmanager
def _connected(ray: Any, jobs: int, address: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            with _same_signals():
                if address is None:
                    stack.enter_context(own_token())
                place = stack.enter_context(own_cluster(jobs)) if address is None else address
                stack.callback(_shut_down, ray)
                ray.init(address=place, log_to_driver=False, logging_level=logging.CRITICAL)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            place = "--workers ray" if address is None else f"--address {address}"
            raise StoppedError(place, f"no Ray cluster answers: {_first_line(error)}", REMEDY) from None
        yield


def _shut_down(ray: Any) -> None:
    """Without what Ray's native code then logs to the terminal about tasks that it ends."""
    try:
        terminal = os.dup(2)
    except OSError:  # closed
        ray.shutdown()
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 2)
        ray.shutdown()
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextmanager
def _same_signals() -> Iterator[None]:
    """Restore the SIGTERM handler: `ray.init` replaces it as soon as it starts, with one that calls `sys.exit(15)`."""
    listening, main = signal.getsignal(signal.SIGTERM), threading.current_thread() is threading.main_thread()
    terminated = False
    try:
        yield
    except SystemExit as stop:
        terminated = main and stop.code == signal.SIGTERM
        raise
    finally:
        if main and listening is not None:  # None: a handler not installed from Python
            signal.signal(signal.SIGTERM, listening)
        if terminated:
            signal.raise_signal(signal.SIGTERM)  # again, for the restored handler


def _fill(ray: Any, job: FillJob, units: Sequence[Unit], stays: bool) -> Iterator[Filled]:
    """`stays`: the connection outlives the work. Where it does not, Ray ends what still runs when it is closed, while a
    task that completes when it is cancelled by force ends the process: a check in Ray that fails."""
    shared, fill = ray.put(job), ray.remote(max_retries=NEVER)(_fill_some)
    waiting = iter(_tasks(units, _cores(ray)))
    running: list[Any] = []
    try:
        while True:
            room = TASKS_PER_CORE * _cores(ray) - len(running)  # counted each time: machines join and leave
            running += [fill.remote([shared], VERSIONS, task) for task in islice(waiting, max(room, 0))]
            if not running:
                return
            finished, running = ray.wait(running)
            yield from ray.get(finished[0])
    finally:
        if stays and running:
            for task in running:
                ray.cancel(task)
            ray.wait(running, num_returns=len(running), timeout=CANCEL_SECONDS)


def _cores(ray: Any) -> int:
    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def _fill_some(shared: list[Any], versions: tuple[str, int], units: list[Unit]) -> list[Filled]:
    """Runs in a worker. `shared`: the reference to the job, in a list so that Ray does not fetch it for every task."""
    if versions != VERSIONS:
        here, there = (f"fxquant {version} with kernels {kernels}" for version, kernels in (versions, VERSIONS))
        fact = f"has {there}, the command runs {here}."
        raise StoppedError(f"worker on {socket.gethostname()}", fact, "Install the same fxquant on every machine.")
    job = _job(shared[0])
    for unit in units:
        job.producer.prefetch(unit)
    return [job.fill(unit) for unit in units]


@lru_cache(maxsize=1)
def _job(reference: Any) -> FillJob:
    return _ray().get(reference)


def _tasks(units: Sequence[Unit], cores: int) -> Iterator[list[Unit]]:
    largest = min(TASK_BYTES, sum(unit.nbytes for unit in units) // (SHARES_PER_CORE * cores))
    task: list[Unit] = []
    nbytes = 0
    for unit in units:
        task.append(unit)
        nbytes += unit.nbytes
        if nbytes >= largest:
            yield task
            task, nbytes = [], 0
    if task:
        yield task


def _first_line(error: object) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _without_type(line: str) -> str:
    """The message in the last line of a traceback, without the exception's type."""
    return line.partition(": ")[2] or line


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise FxquantError("--workers ray", "Ray is not installed.", "pip install 'fxquant[ray]'") from None
    return ray
