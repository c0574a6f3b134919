"""Packed int4 experts in vllm-ascend's layout: w13 of gate_proj and up_proj, w2 of down_proj."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from fxquant.engine_readers.activation import PerToken
from fxquant.engine_readers.folder import Expected, WeightFolder
from fxquant.engine_readers.int4_terms import TwoLevel
from fxquant.engine_readers.names import DOWN, GATE_UP, ExpertPath
from fxquant.engine_readers.packed_layout import NIBBLES_PER_WORD, PackedLayout, pack_layout
from fxquant.engine_readers.packed_shard import PackedShard
from fxquant.engine_readers.ranks import Ranks
from fxquant.engine_readers.split import Split
from fxquant.errors import FxquantError

SCALE_BIAS_COLUMNS = 16
"""Of down_proj: the number of ranks must divide it, and each rank takes its own consecutive columns."""

KERNEL_K, LARGEST_K = 64, 18432
"""Multiple and maximum of k on a rank that the A8W4 grouped matmul takes (ops-transformer, tiling)."""

OUTPUT = torch.bfloat16
"""With a scale_bias vllm-ascend asks the operator for bfloat16 whatever the model's dtype."""


class PackedExperts:
    """Loads one projection of one expert. group_size 0: one scale per channel, and no second one in the files.

    by_name  the engine asks for what it reads by name, and takes no notice of offsets. It rounds scales to the model's
             dtype, then all of them to float16, and the output has the model's dtype (MindIE)
    """

    def __init__(self, folder: WeightFolder, ranks: int, group_size: int, by_name: bool = False) -> None:
        self._folder, self._ranks, self._group_size, self._by_name = folder, ranks, group_size, by_name

    def load(self, path: ExpertPath) -> Ranks:
        """Its part of w13 or w2 on every rank."""
        if SCALE_BIAS_COLUMNS % self._ranks:
            fact = f"{self._ranks} ranks do not divide the {SCALE_BIAS_COLUMNS} columns of scale_bias."
            raise FxquantError(path.stored, fact, "Use 1, 2, 4, 8 or 16, or expert parallelism.")
        row_parallel = path.projection == DOWN
        shards = []
        for layout, half in self._layouts(path):
            second = path.projection == GATE_UP[1]
            shards.append(PackedShard(layout, slice(half, None) if second else slice(0, half)))
        output = self._folder.dtype if self._by_name else OUTPUT
        return Ranks(tuple(shards), row_parallel, PerToken(self._folder.dtype), output)

    def _layouts(self, path: ExpertPath) -> Iterator[tuple[PackedLayout, int]]:
        """The layout on each rank, and how many of its n are the first projection's."""
        if path.projection == DOWN:
            yield from self._down(path.module(DOWN))
            return
        for gate, up in zip(*(list(self._rows(path.module(name))) for name in GATE_UP), strict=True):
            packed, bias = torch.cat((gate[0], up[0])), torch.cat((gate[2], up[2]))
            yield self._layout(path.module(GATE_UP[0]), packed, _stack(gate[1], up[1]), bias), len(gate[2])

    def _rows(self, module: str) -> Iterator[tuple[Tensor, TwoLevel, Tensor]]:
        """Bytes, scales and scale_bias of each rank's rows of gate_proj or up_proj."""
        packed, scales, bias = self._load(module, 1)
        n, k = len(bias), packed.shape[1]
        # unit 2: a byte holds two output channels
        for _, rows, _ in Split(self._ranks, row_parallel=False, whole=False).places(module, n, k, unit=2):
            bytes_of_rows = slice(rows.start // 2, rows.stop // 2)
            yield packed[bytes_of_rows], scales.rows(rows), bias[rows]

    def _down(self, module: str) -> Iterator[tuple[PackedLayout, int]]:
        packed, scales, bias = self._load(module, SCALE_BIAS_COLUMNS)
        n, k = len(bias), packed.shape[1]
        unit, share = self._group_size or 1, SCALE_BIAS_COLUMNS // self._ranks
        for rank, _, inner in Split(self._ranks, row_parallel=True).places(module, n, k, unit):
            groups = slice(inner.start // unit, inner.stop // unit)
            own = scales.groups(groups) if self._group_size else scales
            columns = bias[:, rank * share : (rank + 1) * share]
            yield self._layout(module, packed[:, inner], own, columns), n

    def _layout(self, module: str, packed: Tensor, scales: TwoLevel, bias: Tensor) -> PackedLayout:
        """Raises FxquantError for a shape on one rank that the A8W4 operator does not take."""
        k, n = packed.shape[1], 2 * packed.shape[0]
        if k % KERNEL_K or k > LARGEST_K:
            fact = f"in_features {k} on one rank; the kernel takes multiples of {KERNEL_K} up to {LARGEST_K}."
            raise FxquantError(module, fact, "Use fewer ranks.")
        if n % NIBBLES_PER_WORD:
            raise FxquantError(module, f"out_features {n} on one rank; words hold 8 of them.", "Use fewer ranks.")
        return pack_layout(packed, scales, bias)

    def _load(self, module: str, columns: int) -> tuple[Tensor, TwoLevel, Tensor]:
        n, k = 2 * self._folder.shape(f"{module}.weight")[0], self._folder.shape(f"{module}.weight")[-1]
        if self._group_size and k % self._group_size:
            fact = f"in_features {k} is not a multiple of group_size {self._group_size}."
            raise FxquantError(module, fact, "Quantize with another group_size.")
        stored = self._folder.load(module, _expected(n, k, self._group_size, columns, not self._by_name))
        scales = TwoLevel(stored["weight_scale"].squeeze(1), stored.get("weight_scale_second"))
        if self._by_name:
            second = torch.ones(n, 1) if scales.group is None else scales.group
            scales = TwoLevel(scales.channel, second, self._folder.dtype)
        scales.check(module)
        return stored["weight"], scales, stored["scale_bias"]


def _expected(n: int, k: int, group_size: int, columns: int, offsets: bool) -> dict[str, Expected]:
    """What a ModelSlim expert has. Its weight_offset is allocated and loaded, but no operator reads it; `offsets`:
    the engine fails without."""
    parameters = {
        "weight": Expected((n // 2, k), (torch.int8,)),
        "weight_scale": Expected((n, 1), (torch.float32,)),
        "weight_offset": Expected((n, 1), (torch.float32,), offsets),
        "scale_bias": Expected((n, columns), (torch.float32,)),
    }
    if group_size:
        parameters["weight_scale_second"] = Expected((n, k // group_size), (torch.float32,))
        parameters["weight_offset_second"] = Expected((n, k // group_size), (torch.float32, torch.int64), offsets)
    return parameters


def _stack(first: TwoLevel, second: TwoLevel) -> TwoLevel:
    channel = torch.cat((first.channel, second.channel))
    if first.group is None or second.group is None:
        return replace(first, channel=channel)
    return replace(first, channel=channel, group=torch.cat((first.group, second.group)))
