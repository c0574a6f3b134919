"""Formulas of quantized modules that others wrote: what follows from their own tensors, without a source."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fxquant.ops.quantized import decode_deq_scale
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs
from fxquant.storage.safetensors import TensorInfo
from fxquant.verification.foreign_steps import codes_of, difference
from fxquant.verification.reference import scale_bias
from fxquant.verification.report import Check

FORMULAS = "scale_bias, offsets and static parameters recomputed"


class Tensors(Protocol):
    """The tensors of a folder."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]: ...

    def read(self, name: str) -> Tensor: ...


def tensors_of(folder: Tensors, recipe: Recipe, module: str) -> dict[str, Tensor]:
    """Role → tensor, of one module."""
    return {role: folder.read(tensor_name(module, role)) for role in tensor_specs(recipe)}


def check_formulas(check: Check, recipe: Recipe, module: str, stored: dict[str, Tensor]) -> None:
    """Zero offsets, integer second scales, scale_bias, and static parameters that agree."""
    for role in ("weight_offset", "weight_offset_second"):
        if role in stored:
            count(check, not stored[role].any(), f"{tensor_name(module, role)}: not zero")
    if "weight_scale_second" in stored:
        second = stored["weight_scale_second"]
        whole = torch.equal(second, second.round().clamp(1, 17))
        count(check, whole, f"{tensor_name(module, 'weight_scale_second')}: not all integers 1 … 17")
    if "scale_bias" in stored:
        reason = _wrong_scale_bias(recipe, stored)
        count(check, reason is None, f"{tensor_name(module, 'scale_bias')}: {reason}")
    if recipe.scheme.static:
        reason = _contradiction(recipe, stored, stored.get("bias"))
        count(check, reason is None, f"{module}.{reason}")


def count(check: Check, condition: object, miss: str) -> None:
    """One more item of `check`."""
    check.total += 1
    check.expect(condition, miss)


def _wrong_scale_bias(recipe: Recipe, stored: dict[str, Tensor]) -> str | None:
    """scale_bias, with scales as they are or rounded to bfloat16, up to the order of a sum in float32."""
    codes, scales = codes_of(recipe, stored), stored["weight_scale"].flatten()
    second = stored.get("weight_scale_second", torch.ones(len(scales), 1))
    held = stored["scale_bias"].double()
    ways = [scale_bias(recipe, codes, each, second).double() for each in (scales, scales.bfloat16().float())]
    sums = scale_bias(recipe, codes.abs(), scales, second).double() * 2.0**-20
    if any(bool(((held - way).abs() <= sums).all()) for way in ways):
        return None
    far = (held - ways[0]).abs() > sums
    return f"not 8 times the sums of the codes times their scales: {difference(far, held, ways[0])}"


def _contradiction(recipe: Recipe, stored: dict[str, Tensor], bias: Tensor | None) -> str | None:
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
