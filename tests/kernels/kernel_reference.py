"""Whole-tensor torch forms of the weight kernels: slow, obvious, and exact in float32. Rows of zeros get scale 0."""

import numpy as np
import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import decode_fp8
from fxquant.kernels.activation import encode_deq_scale, fused_parameters, static_parameters
from fxquant.kernels.module_tensors import int4_tensors
from fxquant.kernels.source_rows import SourceRows
from fxquant.schemes.schemes import Recipe, tensor_specs


def quantize_int8(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k], float32 scale [n, 1]: `s = max|W| / 127`, `q = clamp(rne(W / s), -128, 127)`."""
    scale = row_scale(weight, 127, scale_dtype)
    return divided(weight, scale, -128, 127), scale


def quantize_int4_per_channel(weight: Tensor, scale_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k] in [-8, 7], float32 scale [n, 1]: `s = max|W| / 7`, rounded to `scale_dtype`."""
    scale = row_scale(weight, 7, scale_dtype)
    return divided(weight, scale, -8, 7), scale


def quantize_int4_two_level(weight: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """float32 [n, k] → int8 [n, k] in [-8, 7], scale float32 [n, 1], second scale float32 [n, G] of integers 1 … 17.

    s = max|W| / 119; q8 = clamp(rne(W / s), -119, 119); second = max(1, rne(max|q8| over the group / 7));
    q4 = clamp(rne(q8 / second), -8, 7).
    """
    scale = row_scale(weight, 119)
    groups = divided(weight, scale, -119, 119).float().unflatten(1, (-1, group_size))
    second = torch.round(groups.abs().amax(-1) / 7).clamp(min=1)
    q4 = torch.round(groups / second.unsqueeze(-1)).clamp(-8, 7)
    return q4.flatten(1).to(torch.int8), scale, second


def row_scale(weight: Tensor, maximum: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (weight.abs().amax(1, keepdim=True) / maximum).to(dtype).float()


def divided(weight: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.round(weight / torch.where(scale > 0, scale, 1)).clamp_(low, high).to(torch.int8)


def reference_tensors(recipe: Recipe, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Every tensor of one module, from its weight [n, k] as decoded."""
    wide, second = weight.float(), None
    if recipe.int4 and recipe.group_size:
        q, scale, second = quantize_int4_two_level(wide, recipe.group_size)
    else:
        q, scale = (quantize_int4_per_channel if recipe.int4 else quantize_int8)(wide, recipe.scale_dtype)
    tensors = int4_tensors(recipe, q, scale, second) if recipe.int4 else {"weight": q, "weight_scale": scale}
    tensors["weight_offset"] = torch.zeros(len(weight), 1)
    specs = tensor_specs(recipe)
    if recipe.activation is not None and recipe.scheme.static:
        input_scale, input_offset = (value.to(recipe.dtype).view(1) for value in static_parameters(recipe.activation))
        deq_scale, folded = fused_parameters(q.sum(1), scale, input_scale, input_offset, bias)
        tensors |= {"deq_scale": encode_deq_scale(deq_scale, recipe.dtype), "quant_bias": folded.to(torch.int32)}
        tensors |= {"input_scale": input_scale, "input_offset": input_offset}
    if recipe.bias and bias is not None:
        tensors["bias"] = bias
    return {suffix: tensors[suffix].to(spec.dtype) for suffix, spec in specs.items()}


def decoded(source: SourceRows) -> Tensor:
    """The rows as the model's weight: float8 by blocks, then smoothed, each rounded to its dtype."""
    weight = torch.from_numpy(np.array(source.raw)).view(source.dtype).view(source.rows, source.in_features)
    if source.scale_inv is not None:
        above = torch.zeros(source.start, source.in_features, dtype=torch.uint8).view(source.dtype)
        whole = torch.cat((above.view(torch.uint8), weight.view(torch.uint8))).view(source.dtype)
        scales = torch.from_numpy(np.array(source.scale_inv))
        weight = decode_fp8(whole, scales, source.block).to(source.model_dtype)[source.start :]
    if source.smooth is not None:
        weight = (weight.float() * torch.from_numpy(np.array(source.smooth))).to(source.model_dtype)
    if source.divided is not None:
        rows = torch.from_numpy(np.array(source.divided))[source.start :][: source.rows]
        weight = (weight.float() / rows.view(-1, 1)).to(source.model_dtype)
    return weight
