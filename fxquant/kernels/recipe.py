"""Recipe and float weight → every tensor that the linear owns in the weight file."""

import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.kernels import weight as kernels
from fxquant.kernels.activation import encode_deq_scale, fused_parameters, static_parameters
from fxquant.schemes import ROW_PARALLEL_CHUNKS, Recipe, Scheme


def make_tensors(recipe: Recipe, place: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Name suffix → tensor, with the dtypes and shapes of `schemes.tensor_specs`.

    weight [n, k] and bias [n] come in the model's dtype; `place` names the weight in errors. Raises FxquantError for
    NaN or infinite weights.
    """
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise FxquantError(place, "holds NaN or infinity.", "Repair the checkpoint: no scale can represent it.")
    tensors = _int4(recipe, wide) if recipe.scheme is Scheme.W4A8_DYNAMIC else _int8(recipe, wide, bias)
    tensors["weight_offset"] = torch.zeros(wide.shape[0], 1)
    if recipe.bias and bias is not None:
        tensors["bias"] = bias.to(recipe.dtype)
    return tensors


def _int8(recipe: Recipe, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    q, scale = kernels.quantize_int8(weight)
    tensors = {"weight": q, "weight_scale": scale}
    if recipe.scheme is not Scheme.W8A8:
        return tensors
    if recipe.activation is None:
        raise FxquantError(recipe.module, "static, but its input was never observed.", "Calibrate first.")
    input_scale, input_offset = (value.to(recipe.dtype).view(1) for value in static_parameters(recipe.activation))
    deq_scale, quant_bias = fused_parameters(q, scale, input_scale, input_offset, bias)
    if quant_bias.abs().max() > torch.iinfo(torch.int32).max:
        fact = f"its bias is {quant_bias.abs().max():.3g} steps of input_scale * weight_scale, no int32."
        raise FxquantError(recipe.module, fact, "Use W8A8_DYNAMIC for it, or calibrate on text that reaches it.")
    return tensors | {
        "input_scale": input_scale,
        "input_offset": input_offset,
        "deq_scale": encode_deq_scale(deq_scale, recipe.dtype),
        "quant_bias": quant_bias.to(torch.int32),
    }


def _int4(recipe: Recipe, weight: Tensor) -> dict[str, Tensor]:
    chunks = ROW_PARALLEL_CHUNKS if recipe.row_parallel else 1
    if not recipe.group_size:
        q, scale = kernels.quantize_int4_per_channel(weight)
        bias = kernels.scale_bias(q, scale, None, chunks)
        return {"weight": kernels.pack_int4(q), "weight_scale": scale, "scale_bias": bias}
    q, scale, second = kernels.quantize_int4_two_level(weight, recipe.group_size)
    return {
        "weight": kernels.pack_int4(q),
        "weight_scale": scale,
        "weight_scale_second": second,
        "weight_offset_second": torch.zeros_like(second, dtype=torch.int64),
        "scale_bias": kernels.scale_bias(q, scale, second, chunks),
    }


def rounded_weight(recipe: Recipe, weight: Tensor) -> Tensor:
    """float32 [n, k]: what the integers of the recipe's scheme stand for, `q * scale` (`* second scale`)."""
    wide = weight.float()
    if recipe.scheme is not Scheme.W4A8_DYNAMIC:
        q, scale = kernels.quantize_int8(wide)
        return q * scale
    if not recipe.group_size:
        q, scale = kernels.quantize_int4_per_channel(wide)
        return q * scale
    q, scale, second = kernels.quantize_int4_two_level(wide, recipe.group_size)
    return q * second.repeat_interleave(recipe.group_size, 1) * scale
