"""Bench: rates, load time and peak memory of an output, and of a float graph beside it, each in a process of its own.

python -m fxquant.verbs.bench FOLDER PREPACK PARENT STEPS REPEATS THREADS prints a line of JSON for everything that is
measured, and ends with process PARENT.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import DEFAULT, onnx_targets
from fxquant.errors import FxquantError
from fxquant.evaluation.verbs import open_output
from fxquant.generation.rates import Plan, measure_rates
from fxquant.generation.runner import check_runnable, has_onnx, open_runner, prepack_weights
from fxquant.inputs.paths import GRAPH
from fxquant.processes.command import end_with
from fxquant.processes.memory import peak_bytes, resident_bytes
from fxquant.progress import Reporter, silent, within
from fxquant.verbs.compile import compile

PACKAGE = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Session:
    """How a graph is opened: threads of ONNX Runtime, 0 for one per core, and a folder of prepacked weights."""

    threads: int = 0
    prepack: Path | None = None


@dataclass(frozen=True)
class Benchmark:
    """Of one graph.

    runs          "onnxruntime", or "fx graph" where there is no ONNX graph
    rates         "prefill 128" and the like → tokens a second, of all rows together
    past, steps   tokens before those that are decoded, and of these
    load_seconds  until the graph can run; an fx graph reads weights only when it runs
    peak_bytes    resident memory of the process that ran all of it, at its largest
    graph_bytes   of these, what came with the graph, its weights and caches: more than before it was loaded
    """

    runs: str
    rates: dict[str, float]
    past: int
    steps: int
    load_seconds: float
    peak_bytes: int
    graph_bytes: int


def bench(
    out: str | Path,
    against: str | Path | None = None,
    steps: int = 32,
    repeats: int = 3,
    threads: int = 0,
    report: Reporter = silent,
    prepack: str | Path | None = None,
) -> dict[str, Benchmark]:
    """ "out" → its benchmark; with `against` also "against": that of a compiled folder, or "float": that of the float
    graph of a model, which is compiled into a temporary folder for the same runtime.

    `steps`: tokens that are decoded; `repeats`: of everything, of which the median counts; `threads` of ONNX Runtime;
    `prepack`: the folder where its packed weights are kept, written before anything is measured.
    """
    folder, session = Path(out), Session(threads, None if prepack is None else Path(prepack))
    plan = _plan(folder, steps, repeats)
    results = {"out": _benchmark(folder, plan, session, within("out", report))}
    if against is not None:
        compiled = (Path(against) / GRAPH).is_file()
        name = "against" if compiled else "float"
        with _compared(Path(against), compiled, folder, report) as other:
            beside = _plan(other, steps, repeats)
            results[name] = _benchmark(other, beside, session, within(name, report))
    return results


def measure(folder: Path, plan: Plan, session: Session) -> Iterator[tuple[str, Any]]:
    """Name and value of everything, measured in this process, as it comes."""
    program, read = open_output(folder)
    check_runnable(folder, program)
    before, began = resident_bytes(), time.perf_counter()
    runner = open_runner(folder, program, read, session.threads, session.prepack)
    yield "load_seconds", time.perf_counter() - began
    yield from measure_rates(runner, plan)
    yield "peak_bytes", peak_bytes()
    yield "graph_bytes", peak_bytes() - before


def _plan(folder: Path, steps: int, repeats: int) -> Plan:
    config = open_output(folder)[0].config
    plan = Plan(config.get("max_position_embeddings", 1 << 20), config["vocab_size"], steps, repeats)
    if not plan.names:
        raise FxquantError(folder, f"its context of {plan.context} tokens is too short.", "Lower --steps.")
    return plan


def _benchmark(folder: Path, plan: Plan, session: Session, report: Reporter) -> Benchmark:
    values: dict[str, Any] = {}
    if session.prepack is not None:
        with report("prepack", 1, "graphs") as advance:
            prepack_weights(folder, open_output(folder)[0], session.prepack)
            advance(1)
    with report("measure", len(plan.names) + 3, "figures") as advance, _measuring(folder, plan, session) as lines:
        for line in lines:
            name, value = json.loads(line)
            if name == "error":
                raise FxquantError(*value)
            values[name] = value
            advance(1, at=name)
    rates = {name: values[name] for name in plan.names}
    runs = "onnxruntime" if has_onnx(folder) else "fx graph"
    machine = (values["load_seconds"], values["peak_bytes"], values["graph_bytes"])
    return Benchmark(runs, rates, plan.past, plan.steps, *machine)


@contextmanager
def _measuring(folder: Path, plan: Plan, session: Session) -> Iterator[Iterator[str]]:
    """Lines of the process that measures; it ends with the body. Raises FxquantError if it fails."""
    # -P keeps out the current folder, from which fxquant may run without being installed
    path = os.pathsep.join(filter(None, (PACKAGE, os.environ.get("PYTHONPATH"))))
    given = map(str, (folder, session.prepack or "", os.getpid(), plan.steps, plan.repeats, session.threads))
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fxquant.verbs.bench", *given],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": path},
        text=True,
    )
    try:
        assert process.stdout is not None
        yield (line for line in process.stdout if line.endswith("\n"))
        if process.wait():
            fact = f"the process that measures it ended with {process.returncode}, possibly for lack of memory."
            raise FxquantError(folder, fact, f"See what fxquant run {folder} --prompt a says.")
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _compared(against: Path, compiled: bool, out: Path, report: Reporter) -> Iterator[Path]:
    """The compiled folder, or the float graph of a model for the runtime of `out`."""
    if compiled:
        yield against
        return
    target = onnx_targets()[0] if has_onnx(out) else DEFAULT
    with tempfile.TemporaryDirectory(prefix="fxquant-bench-") as folder:
        options = CompileOptions(
            policy="float", target=target, out=Path(folder) / "float", verify=False, export=False, graph_only=True
        )
        yield compile(against, options, within("float", report)).out


def _main(folder: Path, session: Session, steps: int, repeats: int) -> None:
    try:
        for figure in measure(folder, _plan(folder, steps, repeats), session):
            print(json.dumps(figure), flush=True)
    except FxquantError as error:
        print(json.dumps(["error", [error.place, error.fact, error.remedy]]), flush=True)


def as_json(results: dict[str, Benchmark]) -> dict[str, Any]:
    """For scripts."""
    return {name: asdict(result) for name, result in results.items()}


if __name__ == "__main__":
    out, packed, parent, *numbers = sys.argv[1:]
    end_with(int(parent))
    steps, repeats, threads = map(int, numbers)
    _main(Path(out), Session(threads, Path(packed) if packed else None), steps, repeats)
