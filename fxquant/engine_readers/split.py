"""Tensor-parallel split: how the ranks of a group share a weight [n, k]."""

from dataclasses import dataclass

from fxquant.errors import FxquantError


@dataclass(frozen=True)
class Split:
    """`row_parallel` splits k, else n is split.

    `whole`: if the ranks do not divide n, each holds all of it, as engines do with q_a_proj and kv_a_proj_with_mqa;
    without `whole` that is an error.
    """

    ranks: int
    row_parallel: bool
    whole: bool = True

    def places(self, module: str, n: int, k: int, unit: int = 1) -> list[tuple[int, slice, slice]]:
        """(rank, rows, columns) of each shard; the split dimension is shared in multiples of `unit`."""
        size = k if self.row_parallel else n
        if size % (self.ranks * unit):
            if self.whole and not self.row_parallel:
                return [(0, slice(0, n), slice(0, k))]
            side = "in_features" if self.row_parallel else "out_features"
            fact = f"{side} {size} is not a multiple of {self.ranks} ranks x {unit}."
            raise FxquantError(module, fact, "Use fewer ranks, or expert parallelism.")
        share = size // self.ranks
        parts = [slice(rank * share, (rank + 1) * share) for rank in range(self.ranks)]
        if self.row_parallel:
            return [(rank, slice(0, n), part) for rank, part in enumerate(parts)]
        return [(rank, part, slice(0, k)) for rank, part in enumerate(parts)]
