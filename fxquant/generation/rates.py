"""Rates of a graph: tokens a second of prompts and of decoding, on random tokens, as medians over repeats."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.generation.runner import Runner

PROMPTS, BATCHES = (128, 512), (1, 8)
"""Tokens of the prompts that are timed alone, and rows that are decoded together."""
PAST = 128
"""Tokens before those that are decoded, where the context allows."""


@dataclass(frozen=True)
class Plan:
    """What is timed.

    context, vocabulary  of the model
    steps                tokens of each row that are decoded
    repeats              of everything, after one that is not timed
    """

    context: int
    vocabulary: int
    steps: int = 32
    repeats: int = 3

    @property
    def prompts(self) -> list[int]:
        """Tokens of the prompts that fit."""
        return [length for length in PROMPTS if length <= self.context]

    @property
    def past(self) -> int:
        """Tokens before those that are decoded."""
        return max(min(PAST, self.context - self.steps), 1)

    @property
    def batches(self) -> list[int]:
        """Rows to decode together; none where the context has no room for `steps`."""
        return list(BATCHES) if self.past + self.steps <= self.context else []

    @property
    def names(self) -> list[str]:
        """Of all that is timed, in order."""
        prompts = [f"prefill {length}" for length in self.prompts]
        return prompts + [f"decode batch {batch}" for batch in self.batches]


@torch.inference_mode()
def measure_rates(runner: Runner, plan: Plan) -> Iterator[tuple[str, float]]:
    """Each of `plan.names` with its tokens a second; decoding counts the tokens of all rows."""
    for name, length in zip(plan.names, plan.prompts, strict=False):
        ids = _random(1, length, plan)
        yield name, length / _median(lambda: _prefill(runner, ids), plan)  # noqa: B023  # called before the next
    for name, batch in zip(plan.names[len(plan.prompts) :], plan.batches, strict=True):
        start = _prefill(runner, _random(batch, plan.past, plan))
        seconds = _median(lambda: _decode(runner, batch, start, plan), plan)  # noqa: B023
        yield name, batch * plan.steps / seconds


def _median(action: Callable[[], object], plan: Plan) -> float:
    """Seconds of an action."""
    action()
    seconds = []
    for _ in range(plan.repeats):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _random(batch: int, length: int, plan: Plan) -> Tensor:
    return torch.randint(plan.vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def _prefill(runner: Runner, ids: Tensor) -> list[Tensor]:
    positions = torch.arange(ids.shape[1]).expand(ids.shape)
    return runner(ids, torch.ones_like(ids), positions, runner.empty_cache(len(ids)))[1]


def _decode(runner: Runner, batch: int, past: list[Tensor], plan: Plan) -> None:
    for position in range(plan.past, plan.past + plan.steps):
        mask = torch.ones(batch, position + 1, dtype=torch.int64)
        ids, positions = torch.full((batch, 1), position % plan.vocabulary), torch.full((batch, 1), position)
        _, past = runner(ids, mask, positions, past)
