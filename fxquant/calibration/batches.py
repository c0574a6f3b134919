"""Batches of documents, padded on the right, with a mask that excludes padding from every statistic."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import pad as padded

from fxquant.errors import FxquantError
from fxquant.program.operands import operand_node


@dataclass(frozen=True)
class Batch:
    """ids int64 [B, S]; mask int64 [B, S], 1 on tokens and 0 on the padding after them.

    Attention is causal, so no token ever sees the padding to its right.
    """

    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens that are not padding."""
        return int(self.mask.sum())


def batched(documents: Sequence[Tensor], size: int, pad: int) -> list[Batch]:
    """Batches of `size` documents, int64 [1, L] each, in order; shorter ones are padded with the id `pad`."""
    return [_batch(documents[start : start + size], pad) for start in range(0, len(documents), size)]


def real_tokens(value: Tensor, mask: Tensor) -> Tensor:
    """Rows of `value` [B, S, k] or [B·S, k] that are not padding: [tokens, k], on its device."""
    rows = value.flatten(0, -2)
    if mask.all():
        return rows
    if len(rows) != mask.numel():
        fact = f"a layer has {len(rows)} input rows for {mask.numel()} positions: padding cannot be identified."
        raise FxquantError("--batch-size", fact, "Use --batch-size 1.")
    return rows[mask.flatten().to(rows.device) != 0]


def count_experts(
    counts: dict[str, Tensor], gate: fx.Node, values: Sequence[tuple[Tensor, Tensor]], batches: Sequence[Batch]
) -> None:
    """Add to `counts` (module → int64 [E]) the number of tokens that chose each expert of a `fxq::moe_gate`.

    `values` are the gate's results per batch: expert ids int64 [B, S, K] or [B·S, K], and weights. Padding does not
    count.
    """
    experts = operand_node(gate, "logits").meta["val"].shape[-1]
    module = gate.meta["module"]
    for (ids, _), batch in zip(values, batches, strict=True):
        routed = torch.bincount(real_tokens(ids, batch.mask).flatten(), minlength=experts).cpu()
        counts[module] = counts.get(module, 0) + routed


def _batch(documents: Sequence[Tensor], pad: int) -> Batch:
    width = max(ids.shape[1] for ids in documents)
    return Batch(_filled(documents, width, pad), _filled([torch.ones_like(ids) for ids in documents], width, 0))


def _filled(rows: Sequence[Tensor], width: int, value: int) -> Tensor:
    return torch.cat([padded(row, (0, width - row.shape[1]), value=value) for row in rows])
