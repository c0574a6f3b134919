"""Rotation of a program, applied to the vectors of a checkpoint."""

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.transforms.rotation import Turn
from fxquant.transforms.weight_transforms import Smoothing


def rotation(turns: dict[str, Turn], checkpoint: Checkpoint) -> Smoothing:
    """The transforms of `turns`: norms become all ones where rotated weights absorb them, and biases rotate with the
    rows of their weights. Reads only these vectors."""
    transforms = Smoothing(turns=dict(turns))
    for norm in sorted({turn.norm for turn in turns.values()} - {""}):
        transforms.norms[norm] = checkpoint.read(norm)
        transforms.tensors[norm] = torch.ones_like(transforms.norms[norm])
    for name, turn in sorted(turns.items()):
        bias = f"{name.removesuffix('weight')}bias"
        if turn.heads and bias in checkpoint.tensors:
            transforms.tensors[bias] = turn.vector(checkpoint.read(bias))
    return transforms
