"""Operators by token: those whose result for a token needs nothing of other tokens."""

import operator

from fxquant.ops.dense import linear, rms_norm
from fxquant.ops.joined import per_token_int4_linear, per_token_linear, static_linear
from fxquant.ops.quantized import (
    dequantize_per_token,
    dequantize_static,
    int4_matmul,
    int_matmul,
    quantize_per_token,
    quantize_static,
)

BY_TOKEN = {
    linear, rms_norm, quantize_static, quantize_per_token, int_matmul, int4_matmul, dequantize_static,
    dequantize_per_token, static_linear, per_token_linear, per_token_int4_linear, operator.getitem,
}  # fmt: skip
"""Over x [B, S, …]: of linears and norms, of every form that a quantized linear has."""
