"""Greedy decoding: the logits behind each best token, of prompts that run together."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxquant.generation.batch import Batch
from fxquant.generation.runner import Runner


def greedy(runner: Runner, prompts: Sequence[list[int]], steps: int, vocabulary: int) -> Iterator[Tensor]:
    """The logits [prompts, vocabulary] of each of `steps`: first those after the prompts, then those after the best
    token of each row. Nothing ends a row."""
    if steps < 1:
        return
    batch = Batch(runner, prompts, vocabulary)
    with torch.inference_mode():
        logits = batch.prefill()
    yield logits
    for _ in range(steps - 1):
        with torch.inference_mode():
            logits = batch.step(logits.argmax(-1).tolist())
        yield logits
