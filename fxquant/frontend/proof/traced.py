"""Traced side of a proof: the graph on the same tokens, left-padded to one batch."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.frontend.proof.copies import Tokens
from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs, execute

Observe = Callable[[fx.Node, Tensor, int], Tensor]
"""(call, its value, first position of the chunk) → its value, or another to go on with."""


def traced_logits(
    program: Program,
    tensors: dict[str, Tensor],
    tokens: Tokens,
    chunks: Sequence[int] = (),
    observe: Observe | None = None,
) -> Tensor:
    """float32 [rows, 1 + steps, vocabulary]. The prompt runs in one piece, or ends a chunk at each of `chunks`."""
    longest, total = tokens.lengths[0], tokens.ids.shape[1]
    mask = torch.ones(len(tokens.ids), total, dtype=torch.int64)
    for row, length in enumerate(tokens.lengths):
        mask[row, : longest - length] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    widths = [node.meta["val"].shape[2] for node in cache_inputs(program)]
    past, steps, start = [torch.zeros(len(tokens.ids), 0, width) for width in widths], [], 0
    for stop in [*chunks, *range(longest, total + 1)]:
        inputs = [tokens.ids[:, start:stop], mask[:, :stop], positions[:, start:stop], *past]
        logits, *past = execute(program, tensors.__getitem__, [inputs], _observer(observe, start))[0]
        if stop >= longest:
            steps.append(logits[:, -1:])
        start = stop
    return torch.cat(steps, 1)


def _observer(observe: Observe | None, start: int) -> Any:
    if observe is None:
        return None

    def every(node: fx.Node, values: list[Any], live: Any) -> None:
        if isinstance(values[0], Tensor):
            values[0] = observe(node, values[0], start)

    return every
