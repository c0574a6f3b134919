"""Sensitivity report: the cost of quantization by module, by layer and by kind, as data."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fxquant.evaluation.bootstrap import Interval, draw_documents, middle
from fxquant.policy.kinds import Kind


@dataclass(frozen=True)
class Divergence:
    """Mean KL(float ‖ quantized) in nats per token, and its 95 % interval over documents; None for one document."""

    mean: float
    interval: Interval | None

    @classmethod
    def of(cls, sums: Tensor, tokens: Tensor) -> "Divergence":
        """From the sum over each document, float64 [documents], and its tokens, int64 [documents]."""
        mean = float(sums.sum() / tokens.sum())
        if len(sums) == 1:
            return cls(mean, None)
        counts = draw_documents(len(sums))
        return cls(mean, middle(counts @ sums / (counts @ tokens.double())))

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        return {"kl_mean": self.mean, "interval": self.interval and list(self.interval)}


@dataclass(frozen=True)
class ModuleLoss:
    """A model in which one module is quantized.

    module  graph path of a linear, or of the routed experts of a layer
    scheme  its own; different ones of experts' projections are joined with slashes
    sqnr    10·log10(Σ y² / Σ (y − ŷ)²) in dB: y its output in float, ŷ quantized on the same input; inf without noise
    sums    KL of each document, summed over its tokens, float64 [documents]
    """

    module: str
    kind: Kind
    block: str
    scheme: str
    sqnr: float
    kl: Divergence
    sums: Tensor = field(repr=False)

    @classmethod
    def of(
        cls, module: str, kind: Kind, block: str, scheme: str, sqnr: float, sums: Tensor, tokens: Tensor
    ) -> "ModuleLoss":
        """With `tokens` int64 [documents]."""
        return cls(module, kind, block, scheme, sqnr, Divergence.of(sums, tokens), sums)

    def as_json(self) -> dict[str, Any]:
        """For scripts; a SQNR that is not finite is null."""
        fields = {"module": self.module, "kind": self.kind.value, "block": self.block, "scheme": self.scheme}
        return fields | {"sqnr_db": self.sqnr if math.isfinite(self.sqnr) else None} | self.kl.as_json()


@dataclass(frozen=True)
class GroupLoss:
    """Modules of one layer or kind: the sum of what each costs alone, and the lowest SQNR among them."""

    name: str
    modules: int
    sqnr: float
    kl: Divergence

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        sqnr = self.sqnr if math.isfinite(self.sqnr) else None
        return {"name": self.name, "modules": self.modules, "lowest_sqnr_db": sqnr} | self.kl.as_json()


@dataclass(frozen=True)
class Sensitivity:
    """Every module alone, in the order of the graph; sums by layer, by kind and over all.

    together  measured KL with all of them quantized; `total` is what it would be if their errors did not interact
    """

    modules: tuple[ModuleLoss, ...]
    layers: tuple[GroupLoss, ...]
    kinds: tuple[GroupLoss, ...]
    total: GroupLoss
    together: Divergence
    tokens: int
    documents: int

    @classmethod
    def of(cls, modules: list[ModuleLoss], together: Tensor, tokens: Tensor) -> "Sensitivity":
        """together float64, tokens int64 [documents]: KL of the whole quantized graph, summed over each document."""

        def groups(key: Callable[[ModuleLoss], str]) -> tuple[GroupLoss, ...]:
            names = dict.fromkeys(key(module) for module in modules)
            return tuple(_group(name, [module for module in modules if key(module) == name], tokens) for name in names)

        return cls(
            tuple(modules),
            layers=groups(lambda module: module.block),
            kinds=groups(lambda module: module.kind.value),
            total=_group("total", modules, tokens),
            together=Divergence.of(together, tokens),
            tokens=int(tokens.sum()),
            documents=len(tokens),
        )

    @property
    def worst_first(self) -> list[ModuleLoss]:
        """Modules by KL, highest first."""
        return sorted(self.modules, key=lambda module: -module.kl.mean)

    def as_json(self) -> dict[str, Any]:
        """For scripts, modules by KL, worst first."""
        return {
            "modules": [module.as_json() for module in self.worst_first],
            "layers": [group.as_json() for group in self.layers],
            "kinds": [group.as_json() for group in self.kinds],
            "total": self.total.as_json(),
            "together": self.together.as_json(),
            "tokens": self.tokens,
            "documents": self.documents,
        }


def _group(name: str, members: list[ModuleLoss], tokens: Tensor) -> GroupLoss:
    sums = sum((module.sums for module in members), start=members[0].sums * 0)
    return GroupLoss(name, len(members), min(module.sqnr for module in members), Divergence.of(sums, tokens))
