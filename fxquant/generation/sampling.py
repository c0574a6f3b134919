"""Sampling: a token from logits, by temperature, top-k, top-p and min-p in the order of transformers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxquant.errors import FxquantError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Raises FxquantError for numbers out of range.

    temperature         logits / temperature; 0: the best token, and none of the four below
    top_k               only the k best tokens; 0: all
    top_p               of the rest, the fewest tokens whose probabilities sum to at least p
    min_p               of the rest, tokens with at least min_p times the probability of the best
    repetition_penalty  logits of tokens of the text so far, prompt included, are divided by it if positive, else
                        multiplied; before anything else, with temperature 0 too
    seed                of the generator that each prompt has of its own
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0"),
            "top_k": (self.top_k >= 0, "an integer from 0"),
            "top_p": (0 <= self.top_p <= 1, "a number from 0 to 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "a number above 0"),
            "seed": (0 <= self.seed < 1 << 63, "an integer from 0 below 2^63"),
        }
        for name, (holds, expected) in bounds.items():
            if not holds:
                raise FxquantError(name, f"is {getattr(self, name)}.", f"Pass {expected}.")

    @property
    def greedy(self) -> bool:
        """Whether it takes the best token."""
        return self.temperature == 0

    def as_json(self) -> dict[str, Any]:
        """What has an effect."""
        penalty = {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        if self.greedy:
            return {"greedy": True, **penalty}
        off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}
        limits = {name: getattr(self, name) for name, value in off.items() if getattr(self, name) != value}
        return {"greedy": False, "temperature": self.temperature, **limits, **penalty, "seed": self.seed}


class Sampler:
    """Chooses the tokens of one text, with a generator of its own: other texts do not change it."""

    def __init__(self, sampling: Sampling, prompt: list[int]) -> None:
        self._sampling, self._used = sampling, set(prompt)
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def pick(self, logits: Tensor) -> int:
        """The next token, from float [vocabulary]. Raises FxquantError if they are not finite."""
        scores = logits.float()
        if not scores.isfinite().all():
            raise FxquantError("logits", "are not finite.", "Check the weights: fxquant verify OUT")
        if self._sampling.repetition_penalty != 1:
            scores = penalized(scores, self._used, self._sampling.repetition_penalty)
        token = int(scores.argmax()) if self._sampling.greedy else self._drawn(warped(scores, self._sampling))
        self._used.add(token)
        return token

    def _drawn(self, scores: Tensor) -> int:
        """The token at which the sum of probabilities passes a uniform number: one draw for each token."""
        sums = scores.double().softmax(-1).cumsum(-1)
        mark = torch.rand((), generator=self._generator, dtype=torch.float64) * sums[-1]
        place = int(torch.searchsorted(sums, mark, right=True))
        return min(place, int(scores.isfinite().nonzero()[-1]))  # a mark that rounds up to the whole sum


def penalized(scores: Tensor, used: set[int], penalty: float) -> Tensor:
    """`scores` float32 [vocabulary] with those of the tokens in `used` moved down."""
    tokens = torch.tensor(sorted(token for token in used if token < len(scores)), dtype=torch.int64)
    chosen = scores[tokens]
    return scores.index_copy(0, tokens, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def warped(scores: Tensor, sampling: Sampling) -> Tensor:
    """`scores` float32 [vocabulary] over the temperature, -inf for tokens that top-k, top-p or min-p leave out."""
    scores = scores / sampling.temperature
    if sampling.top_k:
        least = scores.topk(min(sampling.top_k, len(scores))).values[-1]
        scores = scores.masked_fill(scores < least, -math.inf)  # of equal ones all stay
    if sampling.top_p < 1:
        ascending, order = scores.sort()
        out = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        out[-1] = False
        scores = scores.masked_fill(out.scatter(0, order, out), -math.inf)
    if sampling.min_p > 0:
        probabilities = scores.softmax(-1)
        scores = scores.masked_fill(probabilities < sampling.min_p * probabilities.max(), -math.inf)
    return scores
