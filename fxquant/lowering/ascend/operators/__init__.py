"""NPU operators, `torch.ops.npu`, of emitted Ascend graphs: CPU reference, and the statements of quantized linears.

`register()` defines them in a process without torch_npu. Arithmetic follows the device as far as it is known, in
float32, and rounds once; arguments that a kernel here does not implement raise ValueError with their name.
"""

import functools
from typing import Any

import torch

from fxquant.lowering.ascend.calls import Fused
from fxquant.lowering.ascend.operators import grouped_matmul, matmul, shapes
from fxquant.lowering.ascend.operators.arguments import Kernel, only_supported
from fxquant.lowering.ascend.operators.attention import npu_fused_infer_attention_score, npu_interleave_rope
from fxquant.lowering.ascend.operators.cache import npu_scatter_pa_kv_cache
from fxquant.lowering.ascend.operators.dense import npu_rms_norm, npu_swiglu
from fxquant.lowering.ascend.operators.fused import (
    npu_add_rms_norm,
    npu_add_rms_norm_dynamic_quant,
    npu_add_rms_norm_quant,
    npu_dequant_swiglu_quant,
)
from fxquant.lowering.ascend.operators.moe import (
    npu_moe_gating_top_k,
    npu_moe_init_routing_v2,
    npu_moe_token_unpermute,
)
from fxquant.lowering.ascend.operators.quantize import npu_dynamic_quant, npu_quantize, npu_trans_quant_param
from fxquant.lowering.ascend.operators.schemas import SCHEMAS
from fxquant.lowering.ascend.operators.shapes import shape_rule

KERNELS: dict[str, Kernel] = {
    "npu_dynamic_quant": npu_dynamic_quant,
    "npu_quantize": npu_quantize,
    "npu_trans_quant_param": npu_trans_quant_param,
    **matmul.KERNELS,
    **grouped_matmul.KERNELS,
    "npu_rms_norm": npu_rms_norm,
    "npu_swiglu": npu_swiglu,
    "npu_add_rms_norm": npu_add_rms_norm,
    "npu_add_rms_norm_quant": npu_add_rms_norm_quant,
    "npu_add_rms_norm_dynamic_quant": npu_add_rms_norm_dynamic_quant,
    "npu_dequant_swiglu_quant": npu_dequant_swiglu_quant,
    "npu_interleave_rope": npu_interleave_rope,
    "npu_fused_infer_attention_score": npu_fused_infer_attention_score,
    "npu_scatter_pa_kv_cache": npu_scatter_pa_kv_cache,
    "npu_moe_gating_top_k": npu_moe_gating_top_k,
    "npu_moe_init_routing_v2": npu_moe_init_routing_v2,
    "npu_moe_token_unpermute": npu_moe_token_unpermute,
}

SHAPES: dict[str, Kernel] = {**shapes.SHAPES, **matmul.SHAPES, **grouped_matmul.SHAPES}
LINEARS: dict[tuple[Any, Any], Fused] = {**matmul.LINEARS, **grouped_matmul.LINEARS}
"""For the emitter: calls that the device fuses with the call that makes their operand."""


def register() -> None:
    """Define the operators of KERNELS for CPU tensors, unless `torch.ops.npu` already has operators.

    torch allows one definition of a namespace: a process that uses torch_npu must import it before this call.
    """
    if not hasattr(torch.ops.npu, "npu_quant_matmul"):
        _define()


@functools.cache
def _define() -> torch.library.Library:
    """The library. The cache keeps it alive: operators disappear with the object that defined them."""
    library = torch.library.Library("npu", "DEF")
    for name, kernel in KERNELS.items():
        library.define(SCHEMAS[name])
        library.impl(name, only_supported(kernel, SCHEMAS[name]), "CPU")
        torch.library.register_fake(f"npu::{name}", shape_rule(SHAPES[name], SCHEMAS[name]), lib=library)
    return library
