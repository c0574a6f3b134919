"""Recipe and float weight → every tensor that the linear owns in the weight file."""

import torch
from torch import Tensor

from fxquant.errors import FxquantError
from fxquant.kernels import weight as kernels
from fxquant.kernels.activation import encode_deq_scale, fused_parameters, static_parameters
from fxquant.schemes import ROW_PARALLEL_CHUNKS, Recipe, tensor_specs


def make_tensors(recipe: Recipe, place: str, weight: Tensor, bias: Tensor | None = None) -> dict[str, Tensor]:
    """Name suffix → tensor, with the dtypes and shapes of `schemes.tensor_specs`.

    weight [n, k] and bias [n] come in the model's dtype; `place` names the weight in errors. Raises FxquantError for
    NaN or infinite weights.
    """
    wide = weight.float()
    if not torch.isfinite(wide).all():
        raise FxquantError(place, "holds NaN or infinity.", "Repair the checkpoint: no scale can represent it.")
    q, scale, second = _codes(recipe, wide)
    tensors = int4_tensors(recipe, q, scale, second) if recipe.int4 else {"weight": q, "weight_scale": scale}
    if recipe.scheme.static:
        tensors |= _static(recipe, q, scale, bias)
    tensors["weight_offset"] = torch.zeros(wide.shape[0], 1)
    specs = tensor_specs(recipe)
    if recipe.bias and bias is not None:
        tensors["bias"] = bias.to(specs["bias"].dtype)
    return {suffix: tensors[suffix] for suffix in specs}


def int4_tensors(recipe: Recipe, q: Tensor, scale: Tensor, second: Tensor | None) -> dict[str, Tensor]:
    """The tensors of an int4 linear in the form of the recipe's dialect, but its offset and bias.

    q int8 [n, k] in [-8, 7], scale float32 [n, 1], second float32 [n, G] or None.
    """
    tensors = {"weight": q, "weight_scale": scale}
    if recipe.dialect.packed:
        chunks = ROW_PARALLEL_CHUNKS if recipe.row_parallel else 1
        tensors |= {"weight": kernels.pack_int4(q), "scale_bias": kernels.scale_bias(q, scale, second, chunks)}
    if second is not None:
        tensors["weight_scale_second"] = second
        tensors["weight_offset_second"] = torch.zeros_like(second, dtype=torch.int64)
    return tensors


def _codes(recipe: Recipe, wide: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Integers, scale of each row, and second scales if the recipe has them."""
    if recipe.int4 and recipe.group_size:
        return kernels.quantize_int4_two_level(wide, recipe.group_size)
    quantize = kernels.quantize_int4_per_channel if recipe.int4 else kernels.quantize_int8
    return *quantize(wide, recipe.scale_dtype), None


def _static(recipe: Recipe, q: Tensor, scale: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    if recipe.activation is None:
        raise FxquantError(recipe.module, "static, but its input was never observed.", "Calibrate first.")
    stored = tensor_specs(recipe)["input_scale"].dtype
    input_scale, input_offset = (value.to(recipe.dtype).view(1) for value in static_parameters(recipe.activation))
    deq_scale, quant_bias = fused_parameters(q, scale, input_scale, input_offset, bias)
    if quant_bias.abs().max() > torch.iinfo(torch.int32).max:
        fact = f"its bias is {quant_bias.abs().max():.3g} steps of input_scale * weight_scale, no int32."
        raise FxquantError(recipe.module, fact, "Use W8A8_DYNAMIC for it, or calibrate on text that reaches it.")
    return {
        "input_scale": input_scale.to(stored),
        "input_offset": input_offset.to(stored),
        "deq_scale": encode_deq_scale(deq_scale, recipe.dtype),
        "quant_bias": quant_bias.to(torch.int32),
    }


def rounded_weight(recipe: Recipe, weight: Tensor) -> Tensor:
    """float32 [n, k]: what the integers of the recipe's scheme stand for, `q * scale` (`* second scale`)."""
    q, scale, second = _codes(recipe, weight.float())
    return q * scale if second is None else q * second.repeat_interleave(recipe.group_size, 1) * scale
