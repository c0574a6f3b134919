"""Norm and activation operators."""

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import require
from fxquant.ops import rms_norm


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """x [..., n], gamma [n] → `x * rstd`, in float32 and back to x's dtype, times gamma; float32 rstd [..., 1].

    `rstd = 1 / sqrt(mean(x²) + epsilon)`.
    """
    require(gamma.dtype == x.dtype, f"npu_rms_norm: gamma is {gamma.dtype}, the input {x.dtype}")
    shape = tuple(gamma.shape)
    require(shape == x.shape[-1:], f"npu_rms_norm: gamma {shape} is not one factor for each of {x.shape[-1]} features")
    rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + epsilon)
    return rms_norm(x, gamma, epsilon), rstd


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    """`silu(first half) * second half` of `dim`, in float32 and rounded once to x's dtype."""
    require(-x.dim() <= dim < x.dim(), f"npu_swiglu: dim {dim} is outside the {x.dim()} dimensions of the input")
    require(x.shape[dim] % 2 == 0, f"npu_swiglu: dim {dim} of size {x.shape[dim]} has no halves")
    # Contiguous halves use the same vector code as those of fxq::swiglu: silu of a strided row may differ in a bit.
    gate, up = (half.float().contiguous() for half in x.chunk(2, dim))
    return (torch.nn.functional.silu(gate) * up).to(x.dtype)
