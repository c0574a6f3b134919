"""Compile plan: MODEL and options → what a compile would write and cost; reads no weights and writes nothing."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fxquant.compilation.options import CompileOptions, as_path, refuse_kv_cache
from fxquant.compilation.prepare import named_policy
from fxquant.engines.table import Target
from fxquant.frontend.source import open_source
from fxquant.gc_pause import uncollected
from fxquant.planning.contents import PlanContents, planned
from fxquant.planning.estimate import PER_WORKER_BYTES, Estimate, Memory, estimate
from fxquant.planning.host_benchmark import Machine, Measuring
from fxquant.policy.policy import load_policy
from fxquant.processes.memory import peak_bytes


@dataclass(frozen=True, kw_only=True)
class Plan(PlanContents):
    """What `compile` would do.

    input_kind  the kind of MODEL; "config.json" if the checkpoint is only described by its config
    machine     as measured, or as `assume` changed it
    """

    model: Path
    input_kind: str
    policy: str
    target: Target
    machine: Machine
    time: Estimate
    memory: Memory

    def as_json(self) -> dict[str, Any]:
        """All fields, and their sums."""
        document = asdict(self) | {"model": str(self.model), "operators": list(self.operators)}
        document["time"] |= {key: getattr(self.time, key) for key in ("disk", "computing", "complete", "total")}
        document["memory"]["peak"] = self.memory.peak
        sums = {key: sum(getattr(row, key) for row in self.rows) for key in ("modules", "parameters")}
        return document | sums | {"bytes_in": self.bytes_in, "bytes_out": self.bytes_out}


def plan(
    model: str | Path,
    options: CompileOptions | None = None,
    jobs: int | None = None,
    assume: Callable[[Machine], Machine] | None = None,
    measuring: Measuring | None = None,
) -> Plan:
    """What `compile(model, options)` would do. MODEL may also be a config.json, or a folder with nothing else.

    `jobs`: workers that quantize, by default one per core. `assume`: the measured machine → the one to estimate for.
    `measuring`: a benchmark that is already running, and that the caller ends. Raises FxquantError as `compile` does.
    """
    start = time.perf_counter()
    options = options or CompileOptions()
    options = replace(options, target=Target(options.target))
    refuse_kv_cache(options.kv_cache)
    with ExitStack() as stack, uncollected():
        # first: it measures while this process traces
        measuring = measuring or stack.enter_context(Measuring(as_path(options.out) or Path.cwd()))
        source = open_source(Path(model), as_path(options.checkpoint), options.trace_timeout, config_only=True)
        policy = load_policy(named_policy(options, source))
        contents = planned(source, policy, options)
        fixed, base = time.perf_counter() - start, peak_bytes()
        machine = measuring.result(contents.work)
    machine = assume(machine) if assume else machine
    spent = estimate(contents.bytes_in, contents.bytes_out, contents.work, machine, jobs, fixed)
    memory = Memory(base, machine.kernel_bytes, spent.workers, PER_WORKER_BYTES + contents.whole)
    return Plan(
        **vars(contents),
        model=Path(model),
        input_kind=source.input_kind,
        policy=policy.name,
        target=options.target,
        machine=machine,
        time=spent,
        memory=memory,
    )
