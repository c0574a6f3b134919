"""Dense float operators of a decoder block: embedding, linear, RMSNorm and SwiGLU.

All take any leading dimensions; the last one is the feature dimension. Arithmetic is in the dtype of `x` unless float32
is stated.
"""

import torch
from torch import Tensor

from fxquant.ops.library import define, expect


def _embedding_shape(weight: Tensor, ids: Tensor) -> Tensor:
    expect(ids.dtype == torch.int64, f"fxq::embedding: ids must be int64, not {ids.dtype}")
    return weight.new_empty((*ids.shape, weight.shape[1]))


@define("embedding(Tensor weight, Tensor ids) -> Tensor", _embedding_shape)
def embedding(weight: Tensor, ids: Tensor) -> Tensor:
    """weight [vocabulary, hidden], ids int64 [...] → [..., hidden]: `weight[ids]`."""
    return weight[ids]


def _linear_shape(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    expect(x.dtype == weight.dtype, f"fxq::linear: x is {x.dtype}, weight is {weight.dtype}")
    expect(x.shape[-1] == weight.shape[1], f"fxq::linear: x has {x.shape[-1]} features, weight {weight.shape[1]}")
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", _linear_shape)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., in_features], weight [out_features, in_features] → `x @ weight.T + bias`."""
    return torch.nn.functional.linear(x, weight, bias)


def _rms_norm_shape(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    expect(x.dtype == weight.dtype, f"fxq::rms_norm: x is {x.dtype}, weight is {weight.dtype}")
    expect(x.shape[-1] == weight.shape[0], f"fxq::rms_norm: x has {x.shape[-1]} features, weight {weight.shape[0]}")
    return x.new_empty(x.shape)


@define("rms_norm(Tensor x, Tensor weight, float eps, Tensor? bias=None) -> Tensor", _rms_norm_shape)
def rms_norm(x: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps)` in float32, cast to x's dtype, times `weight`, plus `bias` (in float32) if any."""
    wide = x.float()
    normed = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    return normed if bias is None else (normed.float() + bias.float()).to(x.dtype)


def _swiglu_shape(gate: Tensor, up: Tensor) -> Tensor:
    expect(gate.shape == up.shape, f"fxq::swiglu: gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
    return gate.new_empty(gate.shape)


@define("swiglu(Tensor gate, Tensor up) -> Tensor", _swiglu_shape)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` (Shazeer 2020, arXiv:2002.05202)."""
    return torch.nn.functional.silu(gate) * up
