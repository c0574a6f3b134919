"""Float linear: a linear that stays in floating point."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import Arithmetic, magnitudes, wide_product
from fxquant.engine_readers.ranks import total_bound
from fxquant.errors import FxquantError


@dataclass(frozen=True)
class FloatLinear:
    """`x @ weight.T + bias`, weight [n, k]; KERNEL rounds x and the result to the model's dtype.

    Ranks that share it change only the order of a sum, which the device does not define either.
    """

    weight: Tensor
    bias: Tensor | None
    dtype: torch.dtype

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        if arithmetic is Arithmetic.EXACT:
            return self.partials(x, arithmetic)[0].float()
        return self.partials(x.to(self.dtype), arithmetic)[0].to(self.dtype).float()

    def partials(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        y = wide_product(x, self.weight)
        return (y if self.bias is None else y + self.bias.double()).unsqueeze(0)

    def partial_bounds(self, x: Tensor) -> Tensor:
        """k products and sums in float64."""
        magnitude = magnitudes(x, self.weight)
        added = 0.0 if self.bias is None else self.bias.double().abs()
        return ((self.weight.shape[1] + 2) * 2.0**-53 * (magnitude + added)).unsqueeze(0)

    def bound(self, x: Tensor) -> Tensor:
        return total_bound(self.partials(x, Arithmetic.EXACT), self.partial_bounds(x))

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        raise FxquantError("linear", "is FLOAT, so its input is not quantized.", "Ask quantized linears only.")

    def codes(self) -> Tensor:
        raise FxquantError("linear", "is FLOAT, so it has no integer codes.", "Ask quantized linears only.")
