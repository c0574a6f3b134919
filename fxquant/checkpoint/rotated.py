"""Rotation of a program, applied to the vectors of a checkpoint."""

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.transforms.rotation import Rotation
from fxquant.transforms.weight_transforms import WeightTransforms


def rotation_transforms(rotations: dict[str, Rotation], checkpoint: Checkpoint) -> WeightTransforms:
    """The transforms of `rotations`: norms become all ones where rotated weights absorb them, and biases rotate with
    the rows of their weights. Reads only these vectors."""
    transforms = WeightTransforms(rotations=dict(rotations))
    for norm in sorted({rotation.norm for rotation in rotations.values()} - {""}):
        transforms.norms[norm] = checkpoint.read(norm)
        transforms.tensors[norm] = torch.ones_like(transforms.norms[norm])
    for name, rotation in sorted(rotations.items()):
        bias = f"{name.removesuffix('weight')}bias"
        if rotation.heads and bias in checkpoint.tensors:
            transforms.tensors[bias] = rotation.vector(checkpoint.read(bias))
    return transforms
