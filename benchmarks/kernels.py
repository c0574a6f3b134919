"""Weight kernels against a plain copy and against the slow reference, side by side: python benchmarks/kernels.py

Each line is the median of interleaved rounds over one float32 weight; ratios within one run are what to compare.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from fxquant.kernels.recipe import make_tensors
from fxquant.reference import expected_tensors
from fxquant.schemes import Recipe, Scheme


def main() -> None:
    """Print seconds, GB/s of float32 weight, and both ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    weight = torch.randn(options.rows, options.columns, generator=torch.Generator().manual_seed(0))
    cases: dict[str, Callable[[], object]] = {"copy": weight.clone}
    for name, scheme, group_size in (
        ("W8A8_DYNAMIC", Scheme.W8A8_DYNAMIC, 0),
        ("W4A8 per channel", Scheme.W4A8_DYNAMIC, 0),
        ("W4A8 groups of 256", Scheme.W4A8_DYNAMIC, 256),
    ):
        recipe = Recipe("w", ("w",), scheme, group_size, *weight.shape, False, False, torch.float32)
        cases[name] = lambda recipe=recipe: make_tensors(recipe, "w", weight)
        cases[f"{name}, reference"] = lambda recipe=recipe: expected_tensors(recipe, weight, None)
    times = {name: [] for name in cases}  # type: dict[str, list[float]]
    for _ in range(options.rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    print(f"{weight.shape[0]} x {weight.shape[1]} float32, {torch.get_num_threads()} threads")
    print(f"{'':30} {'seconds':>9} {'GB/s':>7} {'/ copy':>8} {'/ reference':>12}")
    for name, seconds in medians.items():
        reference = medians.get(f"{name}, reference")
        ratio = f"{seconds / reference:12.3f}" if reference else ""
        rate = weight.nbytes / seconds / 1e9
        print(f"{name:30} {seconds:9.4f} {rate:7.2f} {seconds / medians['copy']:8.1f} {ratio}")


if __name__ == "__main__":
    main()
