"""What counts as one product with a weight."""

import torch
from torch import Tensor, nn

from fxquant.frontend.own.plain_experts import is_plain_linear, not_plain


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


class ByMatmul(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


class Clamped(Own):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1, 1)


class Wide(Own):
    """Another one at one width alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2 if x.shape[-1] == 48 else x)


class Switched(Own):
    clamped = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y.clamp(-1, 1) if self.clamped else y


class OtherWeight(Own):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, torch.zeros_like(self.weight), self.bias)


def made(cls: type[nn.Linear], width: int = 32) -> nn.Linear:
    return cls(width, 16, bias=False, device="meta")


def test_one_product_is_told_at_the_sizes_that_it_has() -> None:
    plain = [made(nn.Linear), made(Own), made(Wide), nn.Linear(32, 16)]
    assert all(is_plain_linear(module) for module in plain)
    other = [made(Clamped), made(Wide, 48), made(OtherWeight), made(ByMatmul), nn.LayerNorm(4), nn.Identity()]
    assert not any(is_plain_linear(module) for module in other)


def test_what_is_attached_to_one_of_many_counts() -> None:
    module = made(Own)
    module.register_forward_pre_hook(lambda module, given: None)
    assert is_plain_linear(made(Own)) and not is_plain_linear(module)


def test_an_attribute_of_one_of_many_counts() -> None:
    module = made(Switched)
    assert is_plain_linear(made(Switched))
    module.clamped = True
    assert not is_plain_linear(module)


def test_parts_without_weights_are_not_asked() -> None:
    expert = nn.ModuleDict({"up": made(Own), "act": nn.SiLU()})
    assert not_plain(expert) == ""
    expert["up"] = Own(32, 16)
    assert not_plain(expert) == "its up has a bias"
