"""Program runner: a program on CPU as a function of tokens and caches, as an ONNX session runs it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.program.program import Program
from fxquant.runtime.execute import cache_inputs, execute
from fxquant.runtime.weight_providers import Read


class ProgramRunner:
    """`program` with the weights of `read`, which are read again for each call.

    past_axes  of each cache, the axis of the tokens so far
    """

    def __init__(self, program: Program, read: Read) -> None:
        self._program, self._read = program, read
        inputs = [node.meta["val"].shape for node in program.graph.graph.nodes if node.op == "placeholder"]
        ids, mask = inputs[:2]
        past = mask[1] - ids[1]
        self._shapes = [list(node.meta["val"].shape) for node in cache_inputs(program)]
        self.past_axes = [shape.index(past, 1) for shape in self._shapes]

    def __call__(
        self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """ids, positions int64 [B, S]; mask int64 [B, T]; past: caches of T - S tokens.

        → logits float32 [B, S, vocabulary], caches of T tokens.
        """
        logits, *presents = execute(self._program, self._read, [[ids, mask, positions, *past]])[0]
        return logits, presents

    def empty_cache(self, batch: int) -> list[Tensor]:
        """`past` for the first call."""
        shapes = [[batch, *shape[1:]] for shape in self._shapes]
        for shape, axis in zip(shapes, self.past_axes, strict=True):
            shape[axis] = 0
        return [torch.zeros(shape) for shape in shapes]
