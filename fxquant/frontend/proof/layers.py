"""Deep copy: all layers of the model, each of the graph's held against the same layer of the own forward.

Each layer of the graph is given what the own forward's layer before gave, so that nothing adds up and the first layer
that differs is the one that is named.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from fxquant.frontend.proof.copies import Tokens
from fxquant.frontend.proof.traced import traced_logits
from fxquant.program.program import Program

LARGEST = 1e-3
"""Relative error of a token's hidden states over one layer. float32 rounds by 6e-8; softmax turns the error of a score
of some hundred, 1e-5, into that of a weight, and norms divide by what cancels: 1e-4; an edit changes 1e-2."""
FEW = 0.01
"""Part of the tokens that may differ: where two experts' scores are equal but for rounding, either may be chosen."""


def first_difference(
    program: Program,
    tensors: dict[str, Tensor],
    tokens: Tokens,
    expected: list[list[list[Tensor]]],
    chunks: Sequence[int],
) -> tuple[int, float] | None:
    """The first layer that differs and by how much, relative to its hidden states; None: all agree.

    expected  [layer][row][call] → hidden states [S, hidden] of the own forward, see eager.py
    """
    nodes = layer_nodes(program, len(expected))
    worst: dict[int, list[Tensor]] = {}

    def observe(node: fx.Node, value: Tensor, start: int) -> Tensor:
        index = nodes.get(node)
        if index is None:
            return value
        own = _padded(expected[index], tokens, value)[:, start : start + value.shape[1]]
        real = _real(tokens)[:, start : start + value.shape[1]]
        error = (value - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12)
        worst.setdefault(index, []).append(error[real])
        return torch.where(real[..., None], own, value)

    traced_logits(program, tensors, tokens, chunks, observe)
    for index in sorted(worst):
        errors = torch.cat(worst[index])
        wrong = ~(errors <= LARGEST)  # NaN is wrong
        if wrong.float().mean() > FEW:
            return index, float(errors.nan_to_num(torch.inf).max())
    return None


def layer_nodes(program: Program, count: int) -> dict[fx.Node, int]:
    """The call whose value a layer hands on → the layer; layers that hand on several are left out."""
    places = {f"model.layers.{index}": index for index in range(count)}
    handed: dict[int, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        index = places.get(node.meta.get("block", ""))
        if node.op != "call_function" or index is None:
            continue
        if any(user.op != "output" and user.meta.get("block") != node.meta["block"] for user in node.users):
            handed.setdefault(index, []).append(node)
    return {nodes[0]: index for index, nodes in handed.items() if len(nodes) == 1}


def _padded(rows: list[list[Tensor]], tokens: Tokens, like: Tensor) -> Tensor:
    """[rows, all positions, hidden]: each row's calls one after the other, after its padding."""
    values = like.new_zeros(len(rows), tokens.ids.shape[1], like.shape[-1])
    for row, calls in enumerate(rows):
        own = torch.cat(calls)
        values[row, values.shape[1] - len(own) :] = own
    return values


def _real(tokens: Tokens) -> Tensor:
    """Bool [rows, all positions]: whether there is a token."""
    first = torch.tensor([tokens.lengths[0] - length for length in tokens.lengths])
    return torch.arange(tokens.ids.shape[1]) >= first[:, None]
