"""Fused operators, one kernel in engines: each equals the sequence of operators that it replaces, bit for bit.

Fusion passes create them in deployment graphs; the stored graph keeps the sequences.
"""

import torch
from torch import Tensor

from fxquant.ops.dense import rms_norm, swiglu
from fxquant.ops.library import define, expect
from fxquant.ops.quantized import quantize_per_token, quantize_static


def _sum_shape(x1: Tensor, x2: Tensor, weight: Tensor, name: str) -> Tensor:
    expect(x1.shape == x2.shape, f"fxq::{name}: x1 {tuple(x1.shape)} and x2 {tuple(x2.shape)} differ")
    kinds = {x1.dtype, x2.dtype, weight.dtype}
    expect(len(kinds) == 1, f"fxq::{name}: x1 is {x1.dtype}, x2 {x2.dtype}, weight {weight.dtype}")
    features = weight.shape[0]
    expect(x1.shape[-1] == features, f"fxq::{name}: x1 has {x1.shape[-1]} features, weight {features}")
    return x1.new_empty(x1.shape)


def _add_rms_norm_shape(
    x1: Tensor, x2: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    total = _sum_shape(x1, x2, weight, "add_rms_norm")
    return total.new_empty(total.shape), total


@define(
    "add_rms_norm(Tensor x1, Tensor x2, Tensor weight, float eps, Tensor? bias=None) -> (Tensor, Tensor)",
    _add_rms_norm_shape,
)
def add_rms_norm(
    x1: Tensor, x2: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x1 + x2)` and `x1 + x2`; x1, x2 [..., n], weight and bias [n]."""
    total = x1 + x2
    return rms_norm(total, weight, eps, bias), total


def _add_rms_norm_quantize_static_shape(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    eps: float,
    input_scale: Tensor,
    input_offset: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    name = "add_rms_norm_quantize_static"
    expect(input_scale.numel() == 1 and input_offset.numel() == 1, f"fxq::{name}: one scale and one offset")
    total = _sum_shape(x1, x2, weight, name)
    return total.new_empty(total.shape, dtype=torch.int8), total


@define(
    "add_rms_norm_quantize_static(Tensor x1, Tensor x2, Tensor weight, float eps, Tensor input_scale, "
    "Tensor input_offset, Tensor? bias=None) -> (Tensor, Tensor)",
    _add_rms_norm_quantize_static_shape,
)
def add_rms_norm_quantize_static(
    x1: Tensor,
    x2: Tensor,
    weight: Tensor,
    eps: float,
    input_scale: Tensor,
    input_offset: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`quantize_static(rms_norm(x1 + x2))` int8 [..., n], and `x1 + x2`; scale and offset [1]."""
    y, total = add_rms_norm(x1, x2, weight, eps, bias)
    return quantize_static(y, input_scale, input_offset), total


def _add_rms_norm_quantize_per_token_shape(
    x1: Tensor, x2: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    total = _sum_shape(x1, x2, weight, "add_rms_norm_quantize_per_token")
    scale = total.new_empty((*total.shape[:-1], 1), dtype=torch.float32)
    return total.new_empty(total.shape, dtype=torch.int8), scale, total


@define(
    "add_rms_norm_quantize_per_token(Tensor x1, Tensor x2, Tensor weight, float eps, Tensor? bias=None) -> "
    "(Tensor, Tensor, Tensor)",
    _add_rms_norm_quantize_per_token_shape,
)
def add_rms_norm_quantize_per_token(
    x1: Tensor, x2: Tensor, weight: Tensor, eps: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize_per_token(rms_norm(x1 + x2))`: int8 [..., n] and scale [..., 1]; and `x1 + x2`."""
    y, total = add_rms_norm(x1, x2, weight, eps, bias)
    return *quantize_per_token(y), total


def _swiglu_quantize_per_token_shape(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    shapes = f"gate {tuple(gate.shape)} and up {tuple(up.shape)}"
    expect(gate.shape == up.shape, f"fxq::swiglu_quantize_per_token: {shapes} differ")
    return gate.new_empty(gate.shape, dtype=torch.int8), gate.new_empty((*gate.shape[:-1], 1), dtype=torch.float32)


@define("swiglu_quantize_per_token(Tensor gate, Tensor up) -> (Tensor, Tensor)", _swiglu_quantize_per_token_shape)
def swiglu_quantize_per_token(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_per_token(silu(gate) * up)`: int8 [..., n] and scale [..., 1]."""
    return quantize_per_token(swiglu(gate, up))
