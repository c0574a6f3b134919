"""Batch: prompts of unequal lengths, left-padded, decoded together with one cache; finished rows leave it."""

import time
from collections.abc import Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from fxquant.generation.runner import Runner

LOGIT_BYTES = 1 << 28
"""Logits of a prompt that are in memory together; a longer prompt runs in chunks."""
SHORTEST_CHUNK = 16


class Row(Protocol):
    """One text: its prompt, and what takes the next tokens."""

    @property
    def ids(self) -> list[int]:
        """The tokens of the prompt."""

    @property
    def finished(self) -> bool:
        """Whether nothing follows."""

    def take(self, logits: Tensor) -> tuple[int, str]:
        """The token chosen from float [vocabulary], and the text that is final with it."""


R = TypeVar("R", bound=Row)


class Batch:
    """Prompts that run together, as token ids. Row b of `mask` int64 [B, T] is 0 on the padding before its prompt."""

    def __init__(self, runner: Runner, prompts: Sequence[list[int]], vocabulary: int) -> None:
        self._runner = runner
        self._past = runner.empty_cache(len(prompts))
        self._chunk = max(SHORTEST_CHUNK, LOGIT_BYTES // (4 * len(prompts) * max(vocabulary, 1)))
        longest = max(map(len, prompts))
        self._ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
        self._mask = torch.zeros_like(self._ids)
        for place, ids in enumerate(prompts):
            self._ids[place, longest - len(ids) :] = torch.tensor(ids)
            self._mask[place, longest - len(ids) :] = 1

    def prefill(self) -> Tensor:
        """Run the prompts; the logits [B, vocabulary] of their last tokens."""
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        for start in range(0, self._ids.shape[1], self._chunk):
            end = min(start + self._chunk, self._ids.shape[1])
            part = self._ids[:, start:end], self._mask[:, :end], positions[:, start:end]
            logits, self._past = self._runner(*part, self._past)
        return logits[:, -1]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Run one token of each row; the logits [B, vocabulary] after them."""
        position = self._mask.sum(1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones_like(position)], 1)
        logits, self._past = self._runner(torch.tensor(tokens).view(-1, 1), self._mask, position, self._past)
        return logits[:, -1]

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, without padding that none of them needs."""
        chosen = torch.tensor(rows)
        mask = self._mask[chosen]
        first = int(mask.any(0).int().argmax())
        self._mask = mask[:, first:]
        axes = self._runner.past_axes
        self._past = [
            cache[chosen].narrow(axis, first, cache.shape[axis] - first).contiguous()
            for cache, axis in zip(self._past, axes, strict=True)
        ]


class Clock:
    """Seconds that a batch took."""

    def __init__(self) -> None:
        self.prefill = self.decode = 0.0
        self._began = time.perf_counter()

    def prefilled(self) -> None:
        """The prompts have run."""
        self.prefill = time.perf_counter() - self._began

    def told(self) -> None:
        """Another token of each row."""
        self.decode = time.perf_counter() - self._began - self.prefill


def decode(runner: Runner, rows: Sequence[R], vocabulary: int, clock: Clock) -> Iterator[tuple[R, str]]:
    """Each row with the text that is final with its next token, until all are finished."""
    rows, batch = list(rows), Batch(runner, [row.ids for row in rows], vocabulary)
    with torch.inference_mode():
        logits = batch.prefill()
    clock.prefilled()
    while True:
        tokens = []
        for row, scores in zip(rows, logits, strict=True):
            token, text = row.take(scores)
            tokens.append(token)
            clock.told()
            yield row, text
        going = [place for place, row in enumerate(rows) if not row.finished]
        if not going:
            return
        with torch.inference_mode():
            if len(going) < len(rows):
                batch.keep(going)
                rows, tokens = [rows[place] for place in going], [tokens[place] for place in going]
            logits = batch.step(tokens)
