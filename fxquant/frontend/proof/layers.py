"""Deep copy: all layers of the model, each of the graph's held against the same layer of the own forward.

Each layer of the graph is given what the own forward's layer before gave, so that nothing adds up and the first layer
that differs is the one that is named.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Expected:
    """What the own forward gives: the path of the layers in the graph, layer → [row][call] → hidden states [S, hidden],
    of the layers that ran once a call, and logits [rows, 1 + steps, vocabulary]."""

    path: str
    layers: dict[int, list[list[Tensor]]]
    logits: Tensor


@dataclass(frozen=True)
class Found:
    """The layers that were compared, and the first that differs with the error relative to its hidden states; an error
    without a layer: the logits differ although the last layer agrees."""

    compared: tuple[int, ...]
    layer: int | None = None
    error: float | None = None

    @property
    def what(self) -> str:
        """What differs."""
        return "logits" if self.layer is None else "hidden states"


def compare_layers(
    program: Program, tensors: dict[str, Tensor], tokens: Tokens, expected: Expected, chunks: Sequence[int]
) -> Found:
    """Run the graph, the prompt cut at `chunks`, each layer on what the own forward's layer before it gave."""
    nodes = layer_nodes(program, expected)
    errors: dict[int, list[Tensor]] = {}

    def observe(node: fx.Node, value: Tensor, start: int) -> Tensor:
        index = nodes.get(node)
        if index is None:
            return value
        own = _padded(expected.layers[index], tokens, value)[:, start : start + value.shape[1]]
        real = _real(tokens)[:, start : start + value.shape[1]]
        errors.setdefault(index, []).append(_relative(value, own)[real])
        return torch.where(real[..., None], own, value)

    logits = traced_logits(program, tensors, tokens, chunks, observe)
    compared = tuple(sorted(errors))
    for index in compared:
        each = torch.cat(errors[index])
        if (~(each <= LARGEST)).float().mean() > FEW:  # NaN is wrong
            return Found(compared, index, float(each.nan_to_num(torch.inf).max()))
    wrong = float(_relative(logits, expected.logits).nan_to_num(torch.inf).max())
    last = len(compared) > 0 and compared[-1] == max(expected.layers)
    return Found(compared, None, wrong if last and wrong > LARGEST else None)


def complete(rows: list[list[Tensor]], tokens: Tokens) -> bool:
    """Whether a layer ran once in each call of each row."""
    lengths = [sum(len(call) for call in calls) for calls in rows]
    return lengths == [length + tokens.steps for length in tokens.lengths]


def layer_nodes(program: Program, expected: Expected) -> dict[fx.Node, int]:
    """The call whose value a layer hands on → the layer; layers that hand on several are left out."""
    places = {f"{expected.path}.{index}": index for index in expected.layers}
    handed: dict[int, list[fx.Node]] = {}
    for node in program.graph.graph.nodes:
        index = places.get(node.meta.get("block", ""))
        if node.op != "call_function" or index is None:
            continue
        if any(user.op != "output" and user.meta.get("block") != node.meta["block"] for user in node.users):
            handed.setdefault(index, []).append(node)
    return {nodes[0]: index for index, nodes in handed.items() if len(nodes) == 1}


def _relative(value: Tensor, own: Tensor) -> Tensor:
    return (value - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-12)


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
