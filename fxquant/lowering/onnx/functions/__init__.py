"""One ONNX function body for each operator of the dialect; parameters are named as in the operator's schema.

Values arrive with their dtype and the dimensions that the graph fixes; a body states its formula where it differs
from the reference in `fxquant.ops`.
"""

from collections.abc import Callable
from typing import Any

from fxquant import ops
from fxquant.lowering.onnx.functions import attention, dense, moe, quantized

Body = Callable[..., Any]

BODIES: dict[Any, Body] = {
    ops.embedding: dense.embedding,
    ops.linear: dense.linear,
    ops.rms_norm: dense.rms_norm,
    ops.swiglu: dense.swiglu,
    ops.rope_table: attention.rope_table,
    ops.rope: attention.rope,
    ops.mla_attention: attention.mla_attention,
    ops.router_logits: moe.router_logits,
    ops.moe_gate: moe.moe_gate,
    ops.moe_init_routing: moe.moe_init_routing,
    ops.moe_finalize_routing: moe.moe_finalize_routing,
    ops.quantize_static: quantized.quantize_static,
    ops.quantize_per_token: quantized.quantize_per_token,
    ops.int_matmul: quantized.int_matmul,
    ops.int4_matmul: quantized.int4_matmul,
    ops.dequantize_static: quantized.dequantize_static,
    ops.dequantize_per_token: quantized.dequantize_per_token,
}
