"""fxquant bench"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fxquant.tools.compile_options import Prepack
from fxquant.tools.console import console, print_json, size
from fxquant.tools.stages import duration, reporter
from fxquant.tools.tables import NamedTable

if TYPE_CHECKING:
    from fxquant.verbs.bench import Benchmark


def command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled folder.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="Measure its float graph too, compiled into a temporary folder; or another compiled folder.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(metavar="N", help="Tokens to decode in each row.", min=1)] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Repeats of which the median counts.", min=1)] = 3,
    threads: Annotated[
        int, typer.Option(metavar="N", help="Threads of ONNX Runtime. [dim]default: one per core[/]", min=0)
    ] = 0,
    prepack: Prepack = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Hide progress.")] = False,
) -> None:
    """Measure OUT on this machine: tokens a second of prompts and of decoding, load time, peak memory.

    Each graph runs in a process of its own, on random tokens: by ONNX Runtime where OUT has an ONNX graph, else as fx
    graph on CPU.
    """
    from fxquant.api import bench
    from fxquant.verbs.bench import as_json as json_of

    results = bench(out, against, steps, repeats, threads, reporter(quiet or as_json), prepack)
    if as_json:
        print_json(json_of(results))
        return
    console.print(benchmark_table(out, results))


def benchmark_table(out: Path, results: "dict[str, Benchmark]") -> NamedTable:
    """A row for each figure; with two graphs also how many times the other's each is."""
    first, *others = results.values()
    title = f"{out} by {first.runs}; decoding {first.steps} tokens after {first.past}"
    table = NamedTable(title, ("", *(name if name != "out" else "OUT" for name in results), *["ratio"] * len(others)))
    for name, speed in first.rates.items():
        speeds = [speed, *(other.rates.get(name) for other in others)]
        table.add_row(f"{name}, tokens/s", *map(_rate, speeds), *(_ratio(speed, other) for other in speeds[1:]))
    loads = [result.load_seconds for result in results.values()]
    table.add_row("load", *map(duration, loads), *(_ratio(loads[0], other) for other in loads[1:]))
    for name, field in (("peak memory", "peak_bytes"), ("of it by the graph", "graph_bytes")):
        peaks = [getattr(result, field) for result in results.values()]
        table.add_row(name, *map(size, peaks), *(_ratio(peaks[0], other) for other in peaks[1:]))
    return table


def _rate(speed: float | None) -> str:
    return "" if speed is None else f"{speed:,.0f}" if speed >= 100 else f"{speed:.3g}"


def _ratio(value: float, other: float | None) -> str:
    return f"{value / other:.2f}" if other else ""
