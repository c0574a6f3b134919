"""Joined operators: quantized linears as one operator each, equal to the steps that they replace, bit for bit.

Passes create them in deployment graphs, for targets whose graphs say a linear in their own operators; the stored graph
keeps the steps. Shapes: k in features, n out features, E experts, M rows sorted by expert.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fxquant.ops.library import REFERENCES, define, expect
from fxquant.ops.quantized import (
    dequantize_per_token,
    dequantize_static,
    grouped_dequantize,
    grouped_int4_matmul,
    grouped_int_matmul,
    int4_matmul,
    int_matmul,
    quantize_static,
)


def _result(x: Tensor, n: int, k: int, name: str, dtype: torch.dtype | None = torch.int8) -> Tensor:
    expect(dtype is None or x.dtype == dtype, f"fxq::{name}: x must be {dtype}, not {x.dtype}")
    expect(x.shape[-1] == k, f"fxq::{name}: x has {x.shape[-1]} features, the weight {k}")
    return x.new_empty((*x.shape[:-1], n), dtype=torch.float32)


def _static_shape(
    x: Tensor, weight: Tensor, input_scale: Tensor, input_offset: Tensor, deq_scale: Tensor, quant_bias: Tensor,
    biased: bool,
) -> Tensor:  # fmt: skip
    return _result(x, weight.shape[0], weight.shape[1], "static_linear", None)


@define(
    "static_linear(Tensor x, Tensor weight, Tensor input_scale, Tensor input_offset, Tensor deq_scale, "
    "Tensor quant_bias, bool biased) -> Tensor",
    _static_shape,
)
def static_linear(
    x: Tensor, weight: Tensor, input_scale: Tensor, input_offset: Tensor, deq_scale: Tensor, quant_bias: Tensor,
    biased: bool,
) -> Tensor:  # fmt: skip
    """float x [..., k], int8 weight [n, k] → float32 [..., n]: quantize_static, int_matmul, dequantize_static.

    biased: whether quant_bias [n] holds more than `-input_offset * Σ_k weight`, which takes the offset out of the sums.
    """
    return dequantize_static(int_matmul(quantize_static(x, input_scale, input_offset), weight), deq_scale, quant_bias)


def _per_token_shape(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    return _result(x, weight.shape[0], weight.shape[1], "per_token_linear")


@define(
    "per_token_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor? bias=None) -> Tensor",
    _per_token_shape,
)
def per_token_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """int8 x [..., k], x_scale [..., 1], int8 weight [n, k], weight_scale [n, 1] → float32 [..., n]."""
    return dequantize_per_token(int_matmul(x, weight), x_scale, weight_scale, bias)


def _per_token_int4_shape(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, weight_scale_second: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _result(x, 2 * weight.shape[0], weight.shape[1], "per_token_int4_linear")


@define(
    "per_token_int4_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, "
    "Tensor? weight_scale_second=None, Tensor? bias=None) -> Tensor",
    _per_token_int4_shape,
)
def per_token_int4_linear(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, weight_scale_second: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `per_token_linear`, with packed int4 [n/2, k] and group scales [n, G]."""
    return dequantize_per_token(int4_matmul(x, weight, weight_scale_second), x_scale, weight_scale, bias)


def _grouped_shape(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor) -> Tensor:
    return _result(x, weight.shape[1], weight.shape[2], "grouped_linear")


@define(
    "grouped_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor counts) -> Tensor",
    _grouped_shape,
)
def grouped_linear(
    x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor], counts: Tensor
) -> Tensor:
    """`per_token_linear` of each expert: x [M, k], weight [E, n, k], weight_scale [E, n, 1], counts int64 [E]."""
    acc = REFERENCES[grouped_int_matmul](x, weight, counts)
    return REFERENCES[grouped_dequantize](acc, x_scale, weight_scale, counts)


def _grouped_int4_shape(
    x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, counts: Tensor,
    weight_scale_second: Tensor | None = None,
) -> Tensor:  # fmt: skip
    return _result(x, 2 * weight.shape[1], weight.shape[2], "grouped_int4_linear")


@define(
    "grouped_int4_linear(Tensor x, Tensor x_scale, Tensor weight, Tensor weight_scale, Tensor counts, "
    "Tensor? weight_scale_second=None) -> Tensor",
    _grouped_int4_shape,
)
def grouped_int4_linear(
    x: Tensor, x_scale: Tensor, weight: Sequence[Tensor], weight_scale: Sequence[Tensor], counts: Tensor,
    weight_scale_second: Sequence[Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """`per_token_int4_linear` of each expert: weight [E, n/2, k], weight_scale_second [E, n, G]."""
    acc = REFERENCES[grouped_int4_matmul](x, weight, counts, weight_scale_second)
    return REFERENCES[grouped_dequantize](acc, x_scale, weight_scale, counts)


GROUPED_LINEARS = {per_token_linear: grouped_linear, per_token_int4_linear: grouped_int4_linear}
"""Operator → the one that does the same on rows sorted by expert."""
