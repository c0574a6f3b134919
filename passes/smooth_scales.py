"""The scale of each channel of a smoothed value, from what calibration saw of it and from the weights that read it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.kernels.activation import static_parameters
from fxquant.kernels.recipe import rounded_weight
from fxquant.ops.quantized import quantize_per_token, quantize_static
from fxquant.schemes import ActivationRange, Recipe
from fxquant.smooth_rule import SmoothMethod, SmoothRule

SMALLEST = 1e-5
"""Scales are no smaller; as are the magnitudes that they are made of, where no reference says otherwise."""
STEPS = 20
"""Of a search, from 0 to 1."""
SEARCH_TOKENS = 512
"""Rows that a search looks at, at most."""


@dataclass(frozen=True)
class Reader:
    """A weight [n, k] that reads a smoothed value, in the model's dtype, and how it will be quantized."""

    recipe: Recipe
    weight: Tensor


def channel_scales(
    rule: SmoothRule, largest: Tensor, weight_largest: Tensor, rows: Tensor, readers: Sequence[Reader]
) -> Tensor:
    """float32 [k] by the rule's method; see `SmoothMethod`.

    largest         float32 [k]: a, the largest magnitude of each channel over all tokens
    weight_largest  float32 [k]: w, that of each column over all quantized weights that read it
    rows, readers   values [tokens, k] and some of these weights, for methods that search
    """
    if rule.method is SmoothMethod.M4:
        return (largest**rule.alpha / weight_largest ** (1 - rule.alpha)).clamp(min=SMALLEST)
    a, w = largest.clamp(min=SMALLEST), weight_largest.clamp(min=SMALLEST)
    alpha, beta = (rule.alpha, 1 - rule.alpha)
    if rule.method is SmoothMethod.FLEX:
        alpha, beta = _search(a, w, rows, readers)
    return torch.where((largest > 0) & (weight_largest > 0), (a**alpha / w**beta).clamp(min=SMALLEST), 1.0)


def _search(a: Tensor, w: Tensor, rows: Tensor, readers: Sequence[Reader]) -> tuple[float, float]:
    """alpha and beta in twentieths: the best alpha with beta = 1 - alpha, then the best beta with that alpha.

    Least is the sum over the readers of `|x W - q(x / s) q(W s)|² / |x W|²`, q as the recipe quantizes: the search of
    the reference quantizer's flex method, with the schemes of the policy in place of its symmetric int8.
    """
    wanted = [rows @ reader.weight.float().T for reader in readers]

    def loss(alpha: float, beta: float) -> float:
        scale = (a**alpha / w**beta).clamp(min=SMALLEST)
        return sum(_error(rows / scale, scale, reader, y) for reader, y in zip(readers, wanted, strict=True))

    grid = [step / STEPS for step in range(STEPS + 1)]
    alpha = min(grid, key=lambda one: loss(one, 1 - one))
    return alpha, min(grid, key=lambda one: (loss(alpha, one), abs(one - 1 + alpha)))


def _error(x: Tensor, scale: Tensor, reader: Reader, wanted: Tensor) -> float:
    weight = rounded_weight(reader.recipe, (reader.weight.float() * scale).to(reader.weight.dtype))
    found = _quantized(x, reader.recipe) @ weight.T
    return float(((found - wanted).square().sum() / wanted.square().sum().clamp(min=1e-30)).double())


def _quantized(x: Tensor, recipe: Recipe) -> Tensor:
    """What the int8 of x [tokens, k] stand for, under the recipe's scheme."""
    if recipe.scheme.static:
        scale, offset = static_parameters(ActivationRange(x.min().item(), x.max().item()))
        return (quantize_static(x, scale.view(1), offset.view(1)) - offset) * scale
    codes, scales = quantize_per_token(x)
    return codes * scales
