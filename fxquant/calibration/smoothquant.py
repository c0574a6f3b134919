"""Smoothing scales per channel, from the observed values and the weights that read them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.kernels.activation import static_parameters
from fxquant.kernels.module_tensors import rounded_weight
from fxquant.ops.quantized import quantize_per_token, quantize_static
from fxquant.policy.smooth_rules import SmoothMethod, SmoothRule
from fxquant.schemes.schemes import ActivationRange, Recipe

SMALLEST = 1e-5
"""Lower bound of scales, and of the magnitudes they are computed from, except in M4, which follows its reference."""
COARSE, FINE = 10, 20
"""Steps of the search from 0 to 1: every coarse step, then the two fine steps beside the best."""
SEARCH_TOKENS = 128
"""Maximum number of rows in the search."""


@dataclass(frozen=True)
class ConsumerWeight:
    """A weight [n, k] that reads a smoothed value, in the model's dtype; the search quantizes it by min_max."""

    recipe: Recipe
    weight: Tensor


def channel_scales(
    rule: SmoothRule, largest: Tensor, weight_largest: Tensor, rows: Tensor, consumers: Sequence[ConsumerWeight]
) -> Tensor:
    """Scales float32 [k] by the rule's method; see `SmoothMethod`.

    largest          float32 [k]: a, the largest magnitude of each channel over all tokens
    weight_largest   float32 [k]: w, that of each column over all quantized weights that read it
    rows, consumers  values [tokens, k] and some of these weights, for search methods
    """
    if rule.method is SmoothMethod.M4:
        return (largest**rule.alpha / weight_largest ** (1 - rule.alpha)).clamp(min=SMALLEST)
    a, w = largest.clamp(min=SMALLEST), weight_largest.clamp(min=SMALLEST)
    alpha, beta = (rule.alpha, 1 - rule.alpha)
    if rule.method is SmoothMethod.FLEX:
        alpha, beta = _search(a, w, rows, consumers)
    # a channel that is always 0, in the values or in the weights, keeps scale 1
    return torch.where((largest > 0) & (weight_largest > 0), (a**alpha / w**beta).clamp(min=SMALLEST), 1.0)


def _search(a: Tensor, w: Tensor, rows: Tensor, consumers: Sequence[ConsumerWeight]) -> tuple[float, float]:
    """alpha and beta in twentieths: the best alpha with beta = 1 - alpha, then the best beta with that alpha.

    The loss is the sum over the readers of `|x W - q(x / s) q(W s)|² / |x W|²`, with q the recipe's quantization: the
    search of the reference quantizer's flex method, with the policy's schemes instead of its symmetric int8.
    """
    exact = [rows @ consumer.weight.float().T for consumer in consumers]

    def loss(alpha: float, beta: float) -> float:
        scale = (a**alpha / w**beta).clamp(min=SMALLEST)
        inputs = {
            static: _quantized(rows / scale, static)
            for static in {consumer.recipe.scheme.static for consumer in consumers}
        }
        products = [inputs[consumer.recipe.scheme.static] @ _rounded(consumer, scale).T for consumer in consumers]
        return sum(map(_error, products, exact))

    alpha = _least(lambda exponent: loss(exponent, 1 - exponent))
    return alpha, _least(lambda exponent: loss(alpha, exponent))


def _least(loss: Callable[[float], float]) -> float:
    """The grid point in [0, 1] with the least loss; ties go to the first one tried."""
    losses = {step / COARSE: loss(step / COARSE) for step in range(COARSE + 1)}
    best = min(losses, key=losses.__getitem__)
    beside = (round(best * FINE) + side for side in (-1, 1))
    losses |= {step / FINE: loss(step / FINE) for step in beside if 0 <= step <= FINE}
    return min(losses, key=losses.__getitem__)


def _rounded(consumer: ConsumerWeight, scale: Tensor) -> Tensor:
    return rounded_weight(consumer.recipe, (consumer.weight.float() * scale).to(consumer.weight.dtype))


def _error(product: Tensor, exact: Tensor) -> float:
    return float(((product - exact).square().sum() / exact.square().sum().clamp(min=1e-30)).double())


def _quantized(x: Tensor, static: bool) -> Tensor:
    """x [tokens, k] quantized to int8 and dequantized."""
    if static:
        scale, offset = static_parameters(ActivationRange(x.min().item(), x.max().item()))
        return (quantize_static(x, scale.view(1), offset.view(1)) - offset) * scale
    codes, scales = quantize_per_token(x)
    return codes * scales
