"""Greedy texts of a rewritten graph, and where those of another run first differ from them.

Two runs that both round correctly sum in different orders. A code of an activation or an expert may flip, and where the
two best tokens are nearer than such flips move the logits of the graph by itself, either may come first.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fxquant.generation.greedy import greedy
from fxquant.program.program import Program
from fxquant.runtime.execute import prefill_inputs
from fxquant.runtime.program_runner import ProgramRunner
from fxquant.runtime.weight_providers import Read
from fxquant.verification.noise import last_bit_noise

NOISE_SEEDS = 16


@dataclass(frozen=True)
class Difference:
    """The first token of a text that differs from the graph's.

    margin  of the graph's best logit there over its second
    """

    prompt: int
    step: int
    margin: float


@dataclass(frozen=True)
class GreedyTexts:
    """What a graph writes after prompts; every call of `read` for a weight may be the last of many."""

    program: Program
    read: Read
    prompts: list[list[int]]
    steps: int

    @cached_property
    def logits(self) -> list[Tensor]:
        """[prompts, vocabulary] of each step."""
        runner = ProgramRunner(self.program, self.read)
        return list(greedy(runner, self.prompts, self.steps, self.program.config["vocab_size"]))

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The new tokens of each prompt."""
        return best_tokens(self.logits)

    def differences(self, tokens: Iterable[list[int]]) -> Iterator[Difference]:
        """Of the texts of another run, in the order of the prompts."""
        for prompt, (own, other) in enumerate(zip(self.tokens, tokens, strict=True)):
            step = next((step for step in range(self.steps) if own[step] != other[step]), None)
            if step is not None:
                best, second = self.logits[step][prompt].topk(2).values.tolist()
                yield Difference(prompt, step, best - second)

    def noise(self, difference: Difference) -> float:
        """How far last-bit noise moves a logit of the graph over the text up to there."""
        text = self.prompts[difference.prompt] + self.tokens[difference.prompt][: difference.step]
        inputs = prefill_inputs(self.program, torch.tensor([text]))
        return last_bit_noise(self.program, self.read, inputs, NOISE_SEEDS).logit


def best_tokens(logits: Iterable[Tensor]) -> list[list[int]]:
    """Of each row, from its logits step by step."""
    return torch.stack([each.argmax(-1) for each in logits], 1).tolist()
