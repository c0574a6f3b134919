"""The `fxq::` dialect: importing this package defines its operators with torch.

Float operators are in `dense`, `attention` and `moe`; quantize, integer matmul and dequantize in `quantized`; operators
that engines run as one kernel in `fused`, those of onnxruntime in `blocks`; attention over a paged cache in
`latent_cache`.
"""

from fxquant.ops.attention import (
    attend_halves,
    attend_heads,
    attend_latents,
    expand_heads,
    mla_attention,
    rope,
    rope_table,
)
from fxquant.ops.blocks import block_experts, block_linear
from fxquant.ops.dense import embedding, linear, rms_norm, swiglu
from fxquant.ops.fused import (
    add_rms_norm,
    add_rms_norm_quantize_per_token,
    add_rms_norm_quantize_static,
    swiglu_quantize_per_token,
)
from fxquant.ops.joined import (
    grouped_int4_linear,
    grouped_linear,
    per_token_int4_linear,
    per_token_linear,
    static_linear,
)
from fxquant.ops.latent_cache import gather_latents, latent_attention, write_latents
from fxquant.ops.library import REFERENCES
from fxquant.ops.moe import moe_experts, moe_finalize_routing, moe_gate, moe_init_routing, router_logits
from fxquant.ops.quantized import (
    dequantize_per_token,
    dequantize_static,
    grouped_dequantize,
    grouped_int4_matmul,
    grouped_int_matmul,
    int4_matmul,
    int_matmul,
    quantize_per_token,
    quantize_static,
)

__all__ = [
    "REFERENCES",
    "add_rms_norm",
    "add_rms_norm_quantize_per_token",
    "add_rms_norm_quantize_static",
    "attend_halves",
    "attend_heads",
    "attend_latents",
    "block_experts",
    "block_linear",
    "dequantize_per_token",
    "dequantize_static",
    "embedding",
    "expand_heads",
    "gather_latents",
    "grouped_dequantize",
    "grouped_int4_matmul",
    "grouped_int4_linear",
    "grouped_int_matmul",
    "grouped_linear",
    "int4_matmul",
    "int_matmul",
    "latent_attention",
    "linear",
    "mla_attention",
    "moe_experts",
    "moe_finalize_routing",
    "moe_gate",
    "moe_init_routing",
    "per_token_int4_linear",
    "per_token_linear",
    "quantize_per_token",
    "quantize_static",
    "rms_norm",
    "rope",
    "rope_table",
    "router_logits",
    "static_linear",
    "swiglu",
    "swiglu_quantize_per_token",
    "write_latents",
]
