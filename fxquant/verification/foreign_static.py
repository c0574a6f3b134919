"""Static parameters of a folder that others wrote, against each other: no text says what their ranges should be."""

import torch
from torch import Tensor

from fxquant.ops.quantized import decode_deq_scale
from fxquant.schemes.schemes import Recipe


def contradiction(recipe: Recipe, stored: dict[str, Tensor], bias: Tensor | None) -> str | None:
    """Why they contradict each other, the tensor first; None if they agree."""
    scale, offset = stored["input_scale"].float(), stored["input_offset"].double()
    deq = decode_deq_scale(stored["deq_scale"]).float()
    if not (torch.isfinite(scale).all() and scale.item() > 0):
        return f"input_scale is {scale.item()}"
    if offset.item() != round(offset.item()) or not -128 <= offset.item() <= 127:
        return f"input_offset is {offset.item()}, not an integer of int8"
    if "weight_scale" in stored:
        weight = stored["weight_scale"].flatten().float()
        # in float32, or in the model's dtype and widened
        narrow = (scale.to(recipe.dtype) * weight.to(recipe.dtype)).float()
        if not (torch.equal(deq, scale * weight) or torch.equal(deq, narrow)):
            return "deq_scale is not input_scale * weight_scale"
    sums = stored["weight"].long().sum(1).double() * offset
    folded = torch.zeros_like(sums) if bias is None else bias.double() / deq.double()
    # a quotient in the model's dtype comes before its rounding to an integer
    slack = torch.finfo(recipe.dtype).eps * folded.abs() + (0.5 if bias is None else 1.0)
    far = ~((stored["quant_bias"].double() - (folded - sums)).abs() <= slack)
    if far.any():
        row = int(far.nonzero()[0])
        return f"quant_bias of output {row} does not follow from bias, deq_scale, input_offset and weight"
    return None
