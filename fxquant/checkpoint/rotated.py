"""A program's rotation over the tensors of a checkpoint."""

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.transforms.rotation import Turn
from fxquant.transforms.weight_transforms import Smoothing


def rotation(turns: dict[str, Turn], checkpoint: Checkpoint) -> Smoothing:
    """What `turns` change: norms become all ones, where turned weights take theirs over, and biases turn with the rows
    of their weights. Reads only these vectors."""
    found = Smoothing(turns=dict(turns))
    for norm in sorted({turn.norm for turn in turns.values()} - {""}):
        found.norms[norm] = checkpoint.read(norm)
        found.tensors[norm] = torch.ones_like(found.norms[norm])
    for name, turn in sorted(turns.items()):
        bias = f"{name.removesuffix('weight')}bias"
        if turn.heads and bias in checkpoint.tensors:
            found.tensors[bias] = turn.vector(checkpoint.read(bias))
    return found
