"""Last-bit noise: how far the graph's own logits move when every float is off by its last bit.

Two engines that both round correctly still sum in different orders. Nearly always the logits then differ in their last
digits; but a value on the edge between two int8 codes, or two experts with nearly equal scores, can fall either way,
and everything after it moves. End-to-end comparisons of generated text are judged by this distance.
"""

from typing import Any

import torch
from torch import Tensor, fx

from fxquant.program.program import Program
from fxquant.runtime.divergence import Divergence, divergence, together
from fxquant.runtime.execute import Values, execute
from fxquant.runtime.weight_providers import Read

LAST_BIT = 2.0**-23


def last_bit_noise(program: Program, read: Read, inputs: list[Tensor], seeds: int) -> Divergence:
    """Of `seeds` runs together, each with every float of the graph changed by up to one part in 2**23."""
    runs = [inputs] * (seeds + 1)
    generator = torch.Generator().manual_seed(0)

    def disturb(node: fx.Node, values: list[Any], inputs: Values) -> None:
        for index, value in enumerate(values[1:], 1):
            if isinstance(value, Tensor) and value.is_floating_point():
                values[index] = value * (1 + LAST_BIT * (2 * torch.rand(value.shape, generator=generator) - 1))

    graph, *disturbed = (outputs[0] for outputs in execute(program, read, runs, disturb))
    return together([divergence(logits, graph) for logits in disturbed])
