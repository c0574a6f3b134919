"""Steps and prompts with each ONNX cache: python benchmarks/onnx_caches.py

A random model, wide enough that products of matrices decide, is compiled with each cache, and once more with
`num_logits_to_keep`. All sessions take turns, with one thread; a figure is the smallest time of their processor.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from large_model import config, write_model
from onnx_speed import WIDE
from rich.table import Table

from fxquant.compilation.options import CompileOptions
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.table import Target
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.tools.console import console
from fxquant.tools.stages import reporter
from fxquant.verbs.compile import compile

CALLS = {
    "a step, 128 tokens before it": (1, 1, 128),
    "a step, 1024 tokens before it": (1, 1, 1024),
    "a step, 4096 tokens before it": (1, 1, 4096),
    "a step of 8 rows, 128 tokens before it": (8, 1, 128),
    "a prompt of 512 tokens": (1, 512, 0),
}
"""Name → rows, new tokens and tokens before them."""
LAST = "latent, last logits"


def main() -> None:
    """Print the table, in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fxquant-caches-") as folder:
        runners = dict(opened(Path(folder), options.layers, options.experts))
        result = Table("", *runners)
        for name, call in CALLS.items():
            best = dict.fromkeys(runners, float("inf"))
            for _ in range(options.rounds):
                best = {title: min(best[title], 1000 * seconds(runner, *call)) for title, runner in runners.items()}
            result.add_row(name, *(f"{figure:.0f}" for figure in best.values()))
        console.print(result)


def opened(folder: Path, layers: int, experts: int) -> Iterator[tuple[str, OnnxRunner]]:
    """A runner of each cache, and one for the last logits alone."""
    write_model(folder / "model", config(layers, experts, **WIDE))
    graphs = {cache.value: (cache, False) for cache in OnnxCache} | {LAST: (OnnxCache.LATENT, True)}
    for title, (cache, last) in graphs.items():
        out, form = folder / f"{cache}-{last}", {"onnx_cache": cache, "onnx_last_logits": last}
        options = CompileOptions(policy="deepseek_w4a8_dynamic", target=Target.ONNX, out=out, verify=False)
        compile(folder / "model", replace(options, **form), reporter(False))
        yield title, OnnxRunner(out, threads=1, last_logits=True)


def seconds(runner: OnnxRunner, rows: int, new: int, past: int) -> float:
    """Of one call."""
    shapes = [list(cache.shape) for cache in runner.empty_cache(rows)]
    for shape, axis in zip(shapes, runner.past_axes, strict=True):
        shape[axis] = past
    ids, positions = torch.full((rows, new), 7), torch.arange(past, past + new).expand(rows, new)
    mask, caches = torch.ones(rows, past + new, dtype=torch.int64), [torch.randn(shape) for shape in shapes]
    began = time.thread_time()
    runner(ids, mask, positions, caches)
    return time.thread_time() - began


if __name__ == "__main__":
    main()
