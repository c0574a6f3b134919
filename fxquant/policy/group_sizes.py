"""Group size `auto`: what the target loads and the model has room for, one for all rules that say it."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ChosenSize:
    """A group size, 0 for one scale per output channel, and the reason in a sentence."""

    size: int
    why: str


def choose(target: str, largest: int, widths: Mapping[str, int]) -> ChosenSize:
    """`largest` of `target`, or 0 if it is not a divisor of every one of `widths`, module → in_features.

    Never a size between: engines load 256 or none, and a file has one size for all its linears.
    """
    if largest == 0:
        return ChosenSize(0, f"group_size auto → 0: {target} loads one scale per channel")
    for module, width in widths.items():
        if width % largest:
            fact = f"in_features {width} of {module} is not a multiple of {largest}"
            return ChosenSize(0, f"group_size auto → 0, one scale per channel: {fact}")
    return ChosenSize(largest, f"group_size auto → {largest}: {target} loads groups of {largest}")
