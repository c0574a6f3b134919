"""From a config to the rewritten graph, at full dimensions and growing depth: python benchmarks/trace.py

Each measurement has a process of its own, so that imports count and peak memory is its own.
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STAGES = ("import", "build", "proof", "trace", "passes")
COLUMNS = ("way in", "layers", *STAGES, "total", "nodes", "rewritten", "MiB", "ms/layer")
POLICY = "deepseek_w4a8_dynamic"
ROOT, OPEN = Path(__file__).resolve().parents[1], ExitStack()
FILES = ROOT / "tests" / "model_files"
WAYS = {
    "fxquant": None,
    "transformers": FILES / "hugging_face.py",
    "DeepSeek": FILES / "deepseek_style.py",
    "LEAVES": FILES / "researcher.py",
}
"""Way in → its model.py; None: the project's own model, as for a checkpoint folder."""


class Way:
    """A model on the meta device. Nothing is undone: the process of a measurement ends after it."""

    def __init__(self, path: Path | None, config: Any) -> None:
        from fxquant.frontend.build import build_model
        from fxquant.frontend.user_file import open_user_file
        from fxquant.models import DeepseekV3

        self.config, self.file = config, path and OPEN.enter_context(open_user_file(path))
        self.model = build_model(self.file, config, "meta") if self.file else DeepseekV3(config)

    def prove(self) -> None:
        """What `fxquant compile` does with a model.py before it takes its graph."""
        from fxquant.frontend.build import build_model
        from fxquant.frontend.proof.prove import prove

        if self.file:
            prove(self.file, self.config, lambda small, device: build_model(self.file, small, device))

    def traceable(self) -> Any:
        """The model, adapted."""
        from fxquant.frontend.adapt import adapted

        return OPEN.enter_context(adapted(self.model, self.config, self.file.leaves)) if self.file else self.model


def main() -> None:
    """Print seconds per stage, nodes and peak memory for each way in and depth, and the cost of a further layer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, help="config.json of a checkpoint; default: the published sizes")
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 61])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), help=f"of {', '.join(WAYS)}, or a model.py")
    parser.add_argument("--rounds", type=int, default=3, help="processes a line; the median of each stage is printed")
    parser.add_argument("--json", action="store_true", help="print numbers instead of a table")
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "LAYERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        way, layers = options.measure
        with OPEN:
            print(json.dumps(measure(way, int(layers), options.config)))
        return
    depths = sorted(options.layers)
    lines = [line for way in options.ways for line in rows(way, depths, options.config, options.rounds)]
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        Console(width=110).print(table(lines))


def rows(way: str, depths: list[int], config_file: Path | None, rounds: int) -> list[dict[str, Any]]:
    """Medians for each depth; `ms/layer` is what trace and passes took for each layer more than in the row above."""
    table: list[dict[str, Any]] = []
    for layers in depths:
        row = {"way in": way, "layers": layers} | medians([in_process(way, layers, config_file) for _ in range(rounds)])
        if table:
            seconds = sum(row[stage] - table[-1][stage] for stage in ("trace", "passes"))
            row["ms/layer"] = 1000 * seconds / (layers - table[-1]["layers"])
        table.append(row)
    return table


def measure(way: str, layers: int, config_file: Path | None) -> dict[str, float]:
    """Seconds of each stage in this process, nodes of the float and of the rewritten graph, peak MiB."""
    if WAYS.get(way, way):
        gc.disable()  # as frontend/child_main.py does
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    times = [time.perf_counter()]
    import torch

    from fxquant.checkpoint.checkpoint import Checkpoint
    from fxquant.checkpoint.config import DeepseekV3Config, parse_config
    from fxquant.passes import AssignSchemes, Calibrate, pipeline, run_passes
    from fxquant.policy.policy import load_policy
    from fxquant.tracing import trace

    times.append(time.perf_counter())
    from published_style import style_published

    OPEN.enter_context(style_published())  # of the tests: in no stage
    times = [time.perf_counter() - (times[1] - times[0]), time.perf_counter()]
    given = json.loads(config_file.read_text()) if config_file else DeepseekV3Config().model_dump()
    given = {key: value for key, value in given.items() if key != "quantization_config"} | {"num_hidden_layers": layers}
    checkpoint, policy = Checkpoint(Path("benchmark"), given, {}), load_policy(POLICY)
    with torch.device("meta"):
        model = Way(WAYS.get(way, Path(way)), parse_config(given, config_file))
    times.append(time.perf_counter())
    model.prove()
    times.append(time.perf_counter())
    program = trace(model.traceable(), checkpoint)
    traced = len(program.graph.graph.nodes)
    times.append(time.perf_counter())
    run_passes(program, pipeline(AssignSchemes(policy), Calibrate(policy, checkpoint.read, lambda: [])))
    times.append(time.perf_counter())
    seconds = {stage: times[index + 1] - times[index] for index, stage in enumerate(STAGES)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return seconds | {"nodes": traced, "rewritten": len(program.graph.graph.nodes), "MiB": peak}


def in_process(way: str, layers: int, config_file: Path | None) -> dict[str, float]:
    """What `measure` gives in a process of its own."""
    config = ["--config", str(config_file)] if config_file else []
    command = [sys.executable, __file__, *config, "--measure", way, str(layers)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of each number, and the sum of the stages'."""
    result = {key: statistics.median(run[key] for run in rounds) for key in rounds[0]}
    return result | {"total": sum(result[stage] for stage in STAGES)}


def table(lines: list[dict[str, Any]]) -> Table:
    """One row a line."""
    shown = Table(title=f"config → {POLICY}, seconds", caption=linearity(lines))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "way in" else "right")
    for line in lines:
        shown.add_row(*(cell(column, line.get(column, "")) for column in COLUMNS))
    return shown


def cell(column: str, value: Any) -> str:
    """A number with two digits if it is seconds, else without."""
    if isinstance(value, str):
        return value
    return f"{value:.2f}" if column in (*STAGES, "total") else f"{value:.0f}"


def linearity(lines: list[dict[str, Any]]) -> str:
    """What the deepest layers cost in terms of the first ones, for each way in: one where the cost is linear."""
    costs: dict[str, list[float]] = {}
    for line in lines:
        costs.setdefault(line["way in"], []).extend([line["ms/layer"]] if "ms/layer" in line else [])
    ratios = [f"{way} {cost[-1] / cost[0]:.2f}" for way, cost in costs.items() if len(cost) > 1]
    return "ms/layer, last row / first: " + ", ".join(ratios) if ratios else ""


if __name__ == "__main__":
    main()
