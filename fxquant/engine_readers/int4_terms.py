"""Int4 terms that all layouts share: sums over groups of k, and the rounding of combined scales."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxquant.engine_readers.arithmetic import U, half_step
from fxquant.errors import FxquantError


@dataclass(frozen=True)
class TwoLevel:
    """The stored scales of n rows: channel float32 [n], group float32 [n, G] of integers, or None for one level.

    held: dtype to which an engine rounds each of them, and their product, on load; it holds the integers exactly.
    """

    channel: Tensor
    group: Tensor | None
    held: torch.dtype = torch.float32

    def combined(self) -> Tensor:
        """float32 [n, G] as engines load it: `f32(fp16(channel * group))`, or `channel` [n, 1] as it is."""
        channel = self.channel.unsqueeze(1).to(self.held)
        if self.group is None:
            return channel.float()
        return (channel * self.group.to(self.held)).to(torch.float16).float()

    def steps(self) -> Tensor:
        """int32 [n, G]: the integer by which the codes of a group are multiplied."""
        if self.group is None:
            return torch.ones(len(self.channel), 1, dtype=torch.int32)
        return self.group.to(torch.int32)

    def error(self) -> Tensor:
        """float64 [n, G]: bound on `|combined - channel * group|`: the channel scale is rounded to `held`, the product
        to `held` and to float32, then to float16."""
        channel = self.channel.unsqueeze(1)
        narrowed = half_step(channel, self.held)
        if self.group is None:
            return narrowed
        product = channel.to(self.held).float() * self.group
        rounded = half_step(product, self.held) + half_step(product.to(self.held).float(), torch.float16)
        return narrowed * self.group.double() + rounded + 2 * U * product.double()

    def rows(self, part: slice) -> "TwoLevel":
        """The scales of some rows."""
        return replace(self, channel=self.channel[part], group=None if self.group is None else self.group[part])

    def groups(self, part: slice) -> "TwoLevel":
        """The scales of some groups."""
        return replace(self, group=None if self.group is None else self.group[:, part])

    def check(self, module: str) -> None:
        """Raises FxquantError for group scales that are not integers, and for a combined scale beyond float16."""
        # first-level codes reach 119 = 7 * 17, int4 codes 7
        if self.group is not None and not torch.equal(self.group, self.group.round().clamp(1, 17)):
            raise FxquantError(f"{module}.weight_scale_second", "not all integers 1 … 17.", "Write the integer scales.")
        if not torch.isfinite(self.combined()).all():
            raise FxquantError(
                f"{module}.weight_scale", "times weight_scale_second is beyond float16.", "Quantize again."
            )


def expand(codes: Tensor, steps: Tensor) -> Tensor:
    """int32 [n, k]: codes times the integer scale [n, G] of their group."""
    return codes.to(torch.int32) * steps.repeat_interleave(codes.shape[1] // steps.shape[1], 1)


def group_sums(x: Tensor, codes: Tensor, groups: int) -> Tensor:
    """float64 [..., n, G]: `Σ x * codes` over each of G equal runs of k; float64 holds these integers exactly."""
    x_groups = x.double().unflatten(-1, (groups, -1))
    return torch.einsum("...gk,ngk->...ng", x_groups, codes.double().unflatten(1, (groups, -1)))
