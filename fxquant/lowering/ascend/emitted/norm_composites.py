"""Norm composites: short sequences around a fused norm; the emitter copies their source into the module it writes."""

import torch
from torch import Tensor


def add_rms_norm_bias(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of x1 + x2 with a bias (float32), which npu_add_rms_norm does not have, and the sum."""
    y, _, total = torch.ops.npu.npu_add_rms_norm(x1, x2, weight, epsilon)
    return (y + bias).to(x1.dtype), total
