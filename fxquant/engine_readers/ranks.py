"""Tensor-parallel ranks: a quantized linear as the ranks of a group hold it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fxquant.engine_readers.activation import Activation
from fxquant.engine_readers.arithmetic import Arithmetic, U

_SMALLEST = 2.0**-149


class Shard(Protocol):
    """What one rank holds. x8 int8 [..., k] is the rank's input, x_scale float32 [..., 1] or [1]."""

    def codes(self) -> Tensor:
        """int8 or int32 [n, k]: the integers by which it multiplies."""

    def exact(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """float64 [..., n], every sum in float64."""

    def kernel(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """float32 [..., n], rounded as on the device, before the output is cast."""

    def bound(self, x8: Tensor, x_scale: Tensor) -> Tensor:
        """float64 [..., n]: how far `exact` may be from what the stored tensors say."""


class Loaded(Protocol):
    """A linear as an engine has loaded it, ready to run."""

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """float32 x [..., k] → float32 [..., n]."""

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """int8 codes of x and their float32 scale."""

    def partials(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """float64 [ranks, ..., n]: what each rank adds to the result; one rank if n is split or nothing is."""

    def partial_bounds(self, x: Tensor) -> Tensor:
        """float64 [ranks, ..., n]: bounds of `partials` in EXACT."""

    def bound(self, x: Tensor) -> Tensor:
        """float64 [..., n]: how far the EXACT result may be from what the stored integers and scales say."""

    def codes(self) -> Tensor:
        """int8 or int32 [n, k]: integers recovered from the loaded layout, int4 times its group scale."""


@dataclass(frozen=True)
class Ranks:
    """`shards` in rank order; `row_parallel`: each reads its slice of x and the results are summed, else each computes
    its part of n.

    On the device, a per-token scale is that of the rank's own slice of the row; EXACT takes the whole row's, so that
    the result does not depend on the number of ranks. dtype is that of the output on the device.
    """

    shards: tuple[Shard, ...]
    row_parallel: bool
    activation: Activation
    dtype: torch.dtype

    def __call__(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        if arithmetic is Arithmetic.EXACT:
            return self.partials(x, arithmetic).sum(0).float()
        return self.partials(x, arithmetic).float().sum(0).to(self.dtype).float()

    def quantize(self, x: Tensor, arithmetic: Arithmetic) -> tuple[Tensor, Tensor]:
        """int8 [..., k] and the scale; in KERNEL, row parallel and per token, one scale per rank [..., ranks]."""
        parts = self._inputs(x, arithmetic)
        if not self.row_parallel or arithmetic is Arithmetic.EXACT or parts[0][1].ndim < x.ndim:
            codes = torch.cat([part[0] for part in parts], -1) if self.row_parallel else parts[0][0]
            return codes, parts[0][1]
        return torch.cat([part[0] for part in parts], -1), torch.cat([part[1] for part in parts], -1)

    def partials(self, x: Tensor, arithmetic: Arithmetic) -> Tensor:
        """As `Loaded.partials`; in KERNEL each rank's part is cast to the output's dtype, as before an all-reduce."""
        inputs = self._inputs(x, arithmetic)
        results = []
        for shard, (x8, x_scale) in zip(self.shards, inputs, strict=True):
            if arithmetic is Arithmetic.EXACT:
                results.append(shard.exact(x8, x_scale))
            else:
                results.append(shard.kernel(x8, x_scale).to(self.dtype).double())
        return torch.stack(results) if self.row_parallel else torch.cat(results, -1).unsqueeze(0)

    def partial_bounds(self, x: Tensor) -> Tensor:
        """float64 [ranks, ..., n]: bounds of `partials`."""
        inputs = self._inputs(x, Arithmetic.EXACT)
        bounds = [shard.bound(x8, scale) for shard, (x8, scale) in zip(self.shards, inputs, strict=True)]
        return torch.stack(bounds) if self.row_parallel else torch.cat(bounds, -1).unsqueeze(0)

    def bound(self, x: Tensor) -> Tensor:
        return total_bound(self.partials(x, Arithmetic.EXACT), self.partial_bounds(x))

    def codes(self) -> Tensor:
        codes = [shard.codes() for shard in self.shards]
        return torch.cat(codes, 1 if self.row_parallel else 0) if len(codes) > 1 else codes[0]

    def _inputs(self, x: Tensor, arithmetic: Arithmetic) -> list[tuple[Tensor, Tensor]]:
        """Each rank's codes and scale."""
        count = len(self.shards)
        if not self.row_parallel:
            return [self.activation.quantize(x, arithmetic)] * count
        if arithmetic is Arithmetic.KERNEL:
            return [self.activation.quantize(part, arithmetic) for part in x.chunk(count, -1)]
        codes, scale = self.activation.quantize(x, arithmetic)
        return [(part, scale) for part in codes.chunk(count, -1)]


def total_bound(partials: Tensor, bounds: Tensor) -> Tensor:
    """float64 [..., n]: the bounds of all ranks [ranks, ..., n], and one rounding of their sum to float32."""
    return bounds.sum(0) + U * partials.sum(0).abs() + _SMALLEST
