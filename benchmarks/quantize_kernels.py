"""Weight kernels on one core, beside other ways to the same integers: python benchmarks/quantize_kernels.py

Every case runs once a round, rounds are interleaved, and the process keeps to one core. Beside the kernels, for each
source dtype: memcpy of the source's bytes; whole-tensor torch (widen, largest magnitude, divide, round, clamp, pack,
scale_bias) on one thread, and the same by blocks of rows whose temporaries stay in cache; and what onnxruntime
quantizes a MatMul's constant with, which takes float32 and makes one float scale a block of k, for 4 and for 8 bits.
The algorithms that search for scales run from bfloat16, on `--searched` rows, beside memcpy alone.
"""

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
from onnxruntime.capi import _pybind_state as onnxruntime
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fxquant.kernels.module_tensors import ModuleMaker
from fxquant.kernels.source_rows import SourceRows
from fxquant.schemes.schemes import Recipe, Scheme, WeightAlgorithm

SHAPES = ((2048, 7168), (7168, 2048))
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8": torch.float8_e4m3fn,
}
GROUP = 256
CACHED = 1 << 18
"""Weights in a block of rows whose float32 temporaries stay in cache."""
TWO_LEVEL = f"W4A8 two-level, g{GROUP}"
SCHEMES = {
    "W8A8_DYNAMIC": (Scheme.W8A8_DYNAMIC, 0),
    TWO_LEVEL: (Scheme.W4A8_DYNAMIC, GROUP),
    "W4A8 per channel": (Scheme.W4A8_DYNAMIC, 0),
}


@dataclass(frozen=True)
class Case:
    """What is run on a weight of `shape`, whose source has `nbytes`."""

    shape: tuple[int, int]
    source: str
    scheme: str
    way: str
    nbytes: int
    run: Callable[[], object]


@dataclass(frozen=True)
class Result:
    """Seconds of a case, and gigabytes a second of its source; `bfloat16_gb_s` counts two bytes a weight."""

    shape: tuple[int, int]
    source: str
    scheme: str
    way: str
    median_s: float
    best_s: float
    median_gb_s: float
    best_gb_s: float
    bfloat16_gb_s: float


def main() -> None:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="default: both")
    parser.add_argument("--searched", type=int, default=256, metavar="N", help="rows for clip and least_squares")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    results = []
    for shape in options.shape or SHAPES:
        benchmarked = [*cases(tuple(shape)), *searches((min(options.searched, shape[0]), shape[1]))]
        results += measure(benchmarked, options.rounds)
    if options.json:
        print(json.dumps([asdict(result) for result in results], indent=1))
    else:
        Console(width=150).print(table(results))


def cases(shape: tuple[int, int]) -> Iterator[Case]:
    """Everything that runs on weights of one shape, the same values in every dtype."""
    n, k = shape
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0))
    blocks = torch.rand(-(-n // 128), -(-k // 128), generator=torch.Generator().manual_seed(1))
    for source, dtype in DTYPES.items():
        stored = weight.to(dtype)
        raw, scales = stored.view(torch.uint8).numpy(), blocks if source == "float8" else None
        rows = SourceRows(raw, dtype, k, scale_inv=None if scales is None else scales.numpy())
        yield Case(shape, source, "", "memcpy", raw.nbytes, memcpy(raw))
        for name, (scheme, group) in SCHEMES.items():
            maker = ModuleMaker(Recipe("w", ("w",), scheme, group, n, k, False, False, torch.bfloat16), "w")
            yield Case(shape, source, name, "kernel", raw.nbytes, partial(maker.rows, rows))
            for way, size in (("torch", n), ("torch by rows", min(1 << (CACHED // k).bit_length() - 1, 128))):
                yield Case(shape, source, name, way, raw.nbytes, partial(in_torch, stored, scales, scheme, group, size))
    for scheme, bits in (("W8A8_DYNAMIC", 8), (TWO_LEVEL, 4)):
        yield Case(shape, "float32", scheme, "onnxruntime", weight.nbytes, in_onnxruntime(weight, bits))


def searches(shape: tuple[int, int]) -> Iterator[Case]:
    """The kernels of the algorithms that search for scales."""
    (n, k), dtype = shape, torch.bfloat16
    raw = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype).view(torch.uint8).numpy()
    yield Case(shape, "bfloat16", "", "memcpy", raw.nbytes, memcpy(raw))
    for algorithm in (WeightAlgorithm.CLIP, WeightAlgorithm.LEAST_SQUARES):
        for name, (scheme, group) in SCHEMES.items():
            recipe = Recipe("w", ("w",), scheme, group, n, k, False, False, dtype, algorithm=algorithm)
            run = partial(ModuleMaker(recipe, "w").rows, SourceRows(raw, dtype, k))
            yield Case(shape, "bfloat16", f"{name} by {algorithm}", "kernel", raw.nbytes, run)


def memcpy(source: np.ndarray) -> Callable[[], object]:
    target = np.zeros_like(source)
    return partial(np.copyto, target, source)


def in_torch(stored: Tensor, scales: Tensor | None, scheme: Scheme, group: int, size: int) -> None:
    """`size` rows at a time, whose temporaries stay in cache if they are few; FP8 blocks are 128 rows."""
    for start in range(0, len(stored), size):
        rows = stored[start : start + size]
        expressions(decoded(rows, None if scales is None else scales[start // 128 :]), scheme, group)


def decoded(stored: Tensor, scales: Tensor | None) -> Tensor:
    """float32 [n, k]; FP8 times its block scales and rounded to bfloat16."""
    if scales is None:
        return stored.float()
    n, k = stored.shape
    wide = scales[: -(-n // 128)].repeat_interleave(min(n, 128), 0)[:n].repeat_interleave(128, 1)[:, :k]
    return (stored.float() * wide).bfloat16().float()


def expressions(weight: Tensor, scheme: Scheme, group: int) -> list[Tensor]:
    """What the kernel makes of float32 [n, k]."""
    if scheme is Scheme.W8A8_DYNAMIC:
        scale = weight.abs().amax(1, keepdim=True) / 127
        return [torch.round(weight / scale).clamp_(-128, 127).to(torch.int8), scale]
    scale = weight.abs().amax(1, keepdim=True) / (119 if group else 7)
    second = torch.ones(len(weight), 1)
    if group:
        groups = torch.round(weight / scale).clamp_(-119, 119).unflatten(1, (-1, group))
        second = torch.round(groups.abs().amax(-1) / 7).clamp_(min=1)
        codes = torch.round(groups / second.unsqueeze(-1)).clamp_(-8, 7).to(torch.int8)
    else:
        codes = torch.round(weight / scale).clamp_(-8, 7).to(torch.int8).unflatten(1, (1, -1))
    sums = (codes.sum(-1) * second.to(torch.int64)).sum(1, keepdim=True)
    bias = (8 * (scale.bfloat16() if group else scale).double() * sums.double()).float()
    codes = codes.flatten(1)
    return [(codes[0::2] & 0xF) | (codes[1::2] << 4), scale, second, bias]


def in_onnxruntime(weight: Tensor, bits: int) -> Callable[[], object]:
    """The function behind its MatMulNBits quantizer, symmetric; it takes the weight as [k, n]."""
    n, k = weight.shape
    blocks = -(-k // GROUP)
    quantize = {4: onnxruntime.quantize_matmul_4bits, 8: onnxruntime.quantize_matmul_8bits}[bits]
    transposed = np.ascontiguousarray(weight.numpy().T)
    packed, scales = np.zeros((n, blocks, GROUP * bits // 8), np.uint8), np.zeros((n, blocks), np.float32)
    zeros = np.zeros((n, -(-blocks * bits // 8)), np.uint8)
    return partial(quantize, packed, transposed, scales, zeros, GROUP, n, k, True)


def measure(benchmarked: list[Case], rounds: int) -> list[Result]:
    """One round to warm up, and to compile; then `rounds`, interleaved."""
    seconds: list[list[float]] = [[] for _ in benchmarked]
    for number in range(rounds + 1):
        for case, times in zip(benchmarked, seconds, strict=True):
            start = time.perf_counter()
            case.run()
            if number:
                times.append(time.perf_counter() - start)
    results = []
    for case, times in zip(benchmarked, seconds, strict=True):
        median, best = statistics.median(times), min(times)
        rates = [case.nbytes / median / 1e9, case.nbytes / best / 1e9, 2e-9 * math.prod(case.shape) / median]
        results.append(Result(case.shape, case.source, case.scheme, case.way, median, best, *rates))
    return results


def table(results: list[Result]) -> Table:
    """GB/s of the source's bytes, medians but for `best`, and how many times as long the others take as the kernel."""
    by_case = {(r.shape, r.source, r.scheme, r.way): r for r in results}
    speeds = Table(title="GB/s of source, one core; right: seconds as multiples of the kernel's")
    columns = ("kernel", "best", "memcpy", "torch", "by rows", "onnxruntime")
    for name in ("weight", "source", "scheme", *columns, "/ memcpy", "torch", "by rows", "onnxruntime"):
        speeds.add_column(name, justify="left" if len(speeds.columns) < 3 else "right")
    for (shape, source, scheme, way), kernel in by_case.items():
        if way != "kernel":
            continue
        copy = by_case[shape, source, "", "memcpy"]
        torch_, rows = (by_case.get((shape, source, scheme, way)) for way in ("torch", "torch by rows"))
        other = by_case.get((shape, "float32", scheme, "onnxruntime"))
        rates = [kernel.median_gb_s, kernel.best_gb_s, copy.median_gb_s]
        rates += [r.median_gb_s if r else None for r in (torch_, rows)]
        shown = {"float32": "{0.median_gb_s:.2f}", "bfloat16": "({0.bfloat16_gb_s:.2f})"}.get(source, "")
        ratios = [kernel.median_s / copy.median_s]
        ratios += [r.median_s / kernel.median_s if r else None for r in (torch_, rows)]
        speeds.add_row(
            f"{shape[0]} x {shape[1]}",
            source,
            scheme,
            *("" if rate is None else f"{rate:.2f}" if rate > 0.2 else f"{rate:.3f}" for rate in rates),
            shown.format(other) if other else "",
            *("" if ratio is None else f"{ratio:.1f}" for ratio in ratios),
            f"{other.median_s / kernel.median_s:.1f}" if other and shown else "",
        )
    return speeds


if __name__ == "__main__":
    main()
