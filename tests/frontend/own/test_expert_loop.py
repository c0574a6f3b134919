"""Loops over experts in the forms that files have, as one grouped call."""

import pytest
import torch
from torch import Tensor, nn

from fxquant.frontend.own.expert_loop import grouped_forward


class Loop(nn.Module):
    """DeepSeek's."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(4))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        counts = torch.bincount(indices.flatten(), minlength=4).tolist()
        for i in range(4):
            if counts[i] == 0:
                continue
            expert = self.experts[i]
            idx, top = torch.where(indices == i)
            y[idx] += expert(x[idx]) * weights[idx, top, None]
        return y * 2


class Hit(Loop):
    """Those that some token chose."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in indices.unique().tolist():
            row, place = torch.where(indices == expert)
            y[row] += self.experts[expert](x[row]) * weights[row, place, None]
        return y * 2


class Added(Loop):
    """By index_add_, over the experts themselves."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, place = (indices == number).nonzero(as_tuple=True)
            out.index_add_(0, row, expert(x[row]) * weights[row, place, None])
        return out * 2


class Method(Loop):
    """In a method, with one_hot."""

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        return self.moe(x, indices, weights) * 2

    def moe(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        final = torch.zeros_like(x)
        mask = nn.functional.one_hot(indices, num_classes=4).permute(2, 0, 1)
        for index in range(4):
            expert = self.experts[index]
            token, place = torch.where(mask[index])
            if token.numel() > 0:
                factor = weights[token, place]
                given = x[token]
                final.index_add_(0, token, expert(given) * factor.unsqueeze(-1))
        return final


class Grouped(nn.Module):
    """Every expert on every token."""

    def __init__(self, experts: nn.ModuleList) -> None:
        super().__init__()
        self.weight = torch.stack([expert.weight for expert in experts])

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        every = torch.einsum("nh,eoh->neo", x, self.weight)
        return (every.gather(1, indices[..., None].expand(-1, -1, 6)) * weights[..., None]).sum(1)


@pytest.mark.parametrize("cls", [Loop, Hit, Added, Method])
@torch.no_grad()
def test_the_grouped_call_is_the_loop(cls: type[Loop]) -> None:
    torch.manual_seed(0)
    module = cls()
    x, weights = torch.randn(9, 6), torch.rand(9, 2)
    indices = torch.stack([torch.randperm(4)[:2] for _ in range(9)])
    expected = module(x, indices, weights)
    grouped = grouped_forward(module)
    assert grouped is not None and grouped[1] == "experts"
    module.experts = Grouped(module.experts)
    torch.testing.assert_close(grouped[0](x, indices, weights), expected, rtol=1e-5, atol=1e-5)


def test_a_forward_without_a_loop_has_none() -> None:
    assert grouped_forward(nn.Sequential(nn.Linear(2, 2))) is None
