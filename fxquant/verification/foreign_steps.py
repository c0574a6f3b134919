"""Steps of quantized weights that others wrote: what integers stand for, and how far that may be from the source."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.ops.quantized import decode_deq_scale, expand_int4
from fxquant.schemes.schemes import Recipe
from fxquant.verification.reference import FEEDBACK_ERROR

ROUNDED = 1.02
"""Slack of that comparison, for solvers that compute in the model's dtype."""
MANY = 0.02
"""Share of elements beyond half a step that a fault does not reach, and feedback between codes does."""
UNBIASED = 0.02
"""Relative deviation of feedback's codes from the source, over a matrix; an edited scale is off as a whole."""


@dataclass(frozen=True)
class Dequantized:
    """What a weight stands for: float32 [n, k]. `half`: half a step of each element, `end`: what it may be off instead
    where it has one of the `last` codes."""

    values: Tensor
    half: Tensor
    end: Tensor
    last: Tensor


def codes_of(recipe: Recipe, stored: dict[str, Tensor]) -> Tensor:
    """int8 [n, k]."""
    packed = recipe.int4 and recipe.weight_format.packed
    return expand_int4(stored["weight"], None) if packed else stored["weight"]


def scales_of(recipe: Recipe, stored: dict[str, Tensor]) -> Tensor:
    """float32 [n, 1]; of a static linear without weight_scale the one that deq_scale holds."""
    if "weight_scale" in stored:
        return stored["weight_scale"].float()
    return (decode_deq_scale(stored["deq_scale"]) / stored["input_scale"].float()).view(-1, 1)


def dequantized(recipe: Recipe, stored: dict[str, Tensor], source: Tensor) -> Dequantized:
    """`source` [n, k] in float32: how far a last code may be from it depends on it."""
    codes, scale = codes_of(recipe, stored).float(), scales_of(recipe, stored)
    last = (codes >= recipe.highest_code) | (codes <= -recipe.highest_code)
    # a division in the model's dtype comes before the rounding to an integer, and a product of scales in it may
    rounding = source.abs() * torch.finfo(recipe.dtype).eps * (0.5 if "weight_scale" in stored else 1.5)
    if not recipe.group_size:
        half = 0.5 * scale + rounding
        values = codes * scale
        plain = source.abs().amax(1, keepdim=True) / recipe.highest_code
        return Dequantized(values, half, _ends(values, source, plain, half, recipe.highest_code), last)
    steps = stored["weight_scale_second"].float().repeat_interleave(recipe.group_size, 1)
    # second scales are rounded: a group of integers up to 7 * second + 3.5 has its largest at the last code
    half = scale * (0.5 * steps + 0.5) + rounding
    rounded = scale * ((0.5 * steps).clamp(min=3.5) + 0.5) + rounding
    values, shape = codes * steps * scale, (-1, recipe.group_size)
    largest = source.abs().view(shape).amax(1, keepdim=True) / recipe.highest_code
    first = scale.repeat_interleave(steps.shape[1] // recipe.group_size, 0)
    plain = torch.round(largest / first.clamp(min=1e-30)).clamp(min=1) * first
    end = _ends(values.view(shape), source.view(shape), plain, rounded.view(shape), recipe.highest_code)
    return Dequantized(values, half, end.view(values.shape), last)


def _ends(values: Tensor, source: Tensor, plain: Tensor, otherwise: Tensor, highest: int) -> Tensor:
    """[r, c]: how far a last code may be off: by any clipping that pays, in rows whose squared error is at most that of
    the step that clips nothing, `plain` [r, 1], as solvers see to it; else as `otherwise`."""
    rounded = torch.round(source / plain.clamp(min=1e-30)).clamp(-highest, highest) * plain
    errors = [((each - source).double() ** 2).sum(1, keepdim=True) for each in (values, rounded)]
    clipped = (errors[0] <= ROUNDED * errors[1]) & (values.abs() < source.abs())
    return torch.where(clipped, source.abs(), otherwise)


def looks_fed_back(stored: Tensor, source: Tensor, far: Tensor) -> bool:
    """Whether codes look as if they compensate each other's errors: many are off, none far, and the sum is not."""
    squares = (source.double() ** 2).sum(1)
    near = bool((((stored - source).double() ** 2).sum(1) <= FEEDBACK_ERROR * squares).all())
    rows = (stored.double() * source.double()).sum(1) / squares.clamp(min=1e-300)
    unbiased = abs(float(rows.mean()) - 1) <= UNBIASED and bool(((rows - 1).abs() <= 5 * UNBIASED).all())
    return near and unbiased and float(far.float().mean()) >= MANY


def difference(far: Tensor, stored: Tensor, source: Tensor) -> str:
    """How many elements are `far`, and the first of them."""
    if not far.any():
        return "equal"
    place = tuple(far.nonzero()[0].tolist())
    count = f"{int(far.sum()):,} of {far.numel():,} elements are beyond it"
    return f"{count}, first at {list(place)}: {stored[place].item():.6g}, the source gives {source[place].item():.6g}"
