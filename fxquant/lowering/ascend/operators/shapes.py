"""Shape rules of the operators, for `torch.export` and fake tensors. Kernels check their arguments, these do not.

Arguments are those of the kernels; a rule takes the ones that decide its result. The rules of quantized linears are
beside their kernels.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxquant.lowering.ascend.operators.arguments import OUTPUT_DTYPES, Kernel, dtype_of


def shape_rule(rule: Kernel, schema: str) -> Kernel:
    """`rule` with all arguments of `schema`; `self` and `input` are `x`, as in the kernels."""
    parsed = torch._C.parse_schema(schema)
    names = ["x" if argument.name in {"self", "input"} else argument.name for argument in parsed.arguments]
    taken = frozenset(inspect.signature(rule).parameters)

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        return rule(**{name: value for name, value in given.items() if name in taken})

    return call


def rows(x: Tensor, *features: Any, dtype: torch.dtype | None = None) -> Tensor:
    """[..., *features] for x [..., k]."""
    return x.new_empty((*x.shape[:-1], *features), dtype=dtype or x.dtype)


def _int8(x: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


def output_dtype_of(code: int | None, otherwise: torch.dtype) -> torch.dtype:
    """The requested dtype, by default `otherwise`."""
    return otherwise if code is None else dtype_of(code, "output_dtype", OUTPUT_DTYPES)


def npu_dynamic_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    return _int8(x), rows(x, dtype=torch.float32)


def npu_quantize(x: Tensor) -> Tensor:
    return _int8(x)


def npu_trans_quant_param(scale: Tensor) -> Tensor:
    return torch.empty_like(scale, dtype=torch.int64)


def npu_rms_norm(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), rows(x, 1, dtype=torch.float32)


def npu_add_rms_norm(x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x1), rows(x1, 1, dtype=torch.float32), torch.empty_like(x1)


def npu_add_rms_norm_quant(x1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _int8(x1), x1.new_empty((0,), dtype=torch.int8), torch.empty_like(x1)


def npu_add_rms_norm_dynamic_quant(x1: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scale = rows(x1, dtype=torch.float32)
    return _int8(x1), x1.new_empty((0,), dtype=torch.int8), torch.empty_like(x1), scale, scale.new_empty((0,))


def npu_dequant_swiglu_quant(x: Tensor) -> tuple[Tensor, Tensor]:
    return rows(x, x.shape[-1] // 2, dtype=torch.int8), rows(x, dtype=torch.float32)


def npu_swiglu(x: Tensor, dim: int = -1) -> Tensor:
    shape = list(x.shape)
    shape[dim] = shape[dim] // 2
    return x.new_empty(shape)


def npu_interleave_rope(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def npu_fused_infer_attention_score(
    query: Tensor, value: Tensor, block_table: Tensor | None = None, softmax_lse_flag: bool = False
) -> tuple[Tensor, Tensor]:
    """Layout BSND over whole sequences, BNSD over pages."""
    batch, steps, heads, _ = query.shape
    shape = (batch, heads, steps, 1) if softmax_lse_flag else (1,)
    context = torch.empty_like(query) if block_table is not None else rows(query, value.shape[-1])
    return context, query.new_empty(shape, dtype=torch.float32)


def npu_scatter_pa_kv_cache(key: Tensor) -> None:
    return None


def npu_moe_gating_top_k(x: Tensor, k: int, out_flag: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    scores = x.new_empty(x.shape if out_flag else (0,), dtype=torch.float32)
    return rows(x, k), rows(x, k, dtype=torch.int32), scores


def npu_moe_init_routing_v2(
    x: Tensor, expert_idx: Tensor, expert_num: int = -1, active_expert_range: Sequence[int] = ()
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    low, high = active_expert_range or (0, expert_num)
    copies = expert_idx.shape[0] * expert_idx.shape[1]
    counts = x.new_empty((high - low,), dtype=torch.int64)
    row_index = x.new_empty((copies,), dtype=torch.int32)
    return x.new_empty((copies, x.shape[1])), row_index, counts, x.new_empty((0,), dtype=torch.float32)


def npu_moe_token_unpermute(permuted_tokens: Tensor, sorted_indices: Tensor, probs: Tensor | None = None) -> Tensor:
    tokens = sorted_indices.shape[0] if probs is None else probs.shape[0]
    return permuted_tokens.new_empty((tokens, permuted_tokens.shape[1]))


SHAPES: dict[str, Kernel] = {
    rule.__name__: rule
    for rule in (
        npu_dynamic_quant,
        npu_quantize,
        npu_trans_quant_param,
        npu_rms_norm,
        npu_add_rms_norm,
        npu_add_rms_norm_quant,
        npu_add_rms_norm_dynamic_quant,
        npu_dequant_swiglu_quant,
        npu_swiglu,
        npu_interleave_rope,
        npu_fused_infer_attention_score,
        npu_scatter_pa_kv_cache,
        npu_moe_gating_top_k,
        npu_moe_init_routing_v2,
        npu_moe_token_unpermute,
    )
}
