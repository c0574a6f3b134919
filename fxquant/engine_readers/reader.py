"""Engine reader, common part: decides on types, refuses modules that disagree, loads module by module."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch

from fxquant.engine_readers.folder import WeightFolder
from fxquant.engine_readers.linear_loader import (
    FLOAT,
    W4A8_DYNAMIC,
    W8A8,
    W8A8_DYNAMIC,
    W8A8_MIX,
    LinearRules,
    load_linear,
)
from fxquant.engine_readers.names import DOWN, PROJECTIONS, ExpertPath, expert_path, fused_group, ranks_of
from fxquant.engine_readers.ranks import Loaded
from fxquant.engine_readers.split import Split
from fxquant.errors import FxquantError

LINEAR_TYPES = (FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX)
EXPERT_TYPES = (FLOAT, W8A8_DYNAMIC, W4A8_DYNAMIC)


@dataclass(frozen=True)
class EngineReader:
    """One engine's reading of a folder, for `ranks` tensor-parallel ranks.

    load_int4      how it loads one projection of a W4A8_DYNAMIC expert
    whole_experts  an expert is whole on its rank, as expert-parallel ranks have it
    """

    name: str
    folder: WeightFolder
    ranks: int
    rules: LinearRules
    load_int4: Callable[[ExpertPath], Loaded]
    whole_experts: bool = False

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise FxquantError("tp", f"{self.ranks} ranks.", "Use at least one.")

    @property
    def shown(self) -> str:
        """Its name, and its ranks if there are several."""
        whole = ", experts whole" if self.whole_experts else ""
        return self.name if self.ranks == 1 else f"{self.name} on {self.ranks} ranks{whole}"

    def with_whole_experts(self, on_one: "EngineReader") -> Self:
        """This reading with experts as `on_one`, the same engine's reader for one rank, loads them."""
        return replace(self, load_int4=on_one.load_int4, whole_experts=True)

    def linear(self, module: str, row_parallel: bool = False) -> Loaded:
        """A linear outside the routed experts. Raises FxquantError if the engine fails, or would load garbage."""
        kind = self.folder.type_of(module)
        if kind not in LINEAR_TYPES:
            fact = f"{kind}; {self.name} takes {', '.join(LINEAR_TYPES)} for linears."
            raise FxquantError(module, fact, "Use one of them.")
        return load_linear(self.folder, self.rules, module, Split(ranks_of(module, self.ranks), row_parallel))

    def expert_linear(self, module: str, row_parallel: bool = False) -> Loaded:
        """One projection of one routed expert."""
        path = self.locate(module)
        if row_parallel != (path.projection == DOWN):
            raise FxquantError(module, f"row_parallel={row_parallel}.", "Engines split k of down_proj only.")
        kind = self._expert_type(path)
        if kind == W4A8_DYNAMIC:
            return self.load_int4(path)
        split = Split(1 if self.whole_experts else self.ranks, row_parallel, whole=False)
        return load_linear(self.folder, self.rules, path.module(path.projection), split)

    def locate(self, module: str) -> ExpertPath:
        """Where an expert's tensors are stored."""
        return expert_path(module)

    def fused_with(self, module: str) -> tuple[str, ...]:
        """The modules that are loaded into one with this one, itself included; empty if it is not fused."""
        group = fused_group(module)
        return group if all(f"{shard}.weight" in self.folder.description for shard in group) else ()

    def check_fused(self, group: tuple[str, ...]) -> None:
        """Raises FxquantError if the shards of a fused module differ in type, or, static, in their input's scale.

        Engines refuse the first. They hold one input_scale and input_offset for all shards, and the last one loaded
        silently wins.
        """
        types = {module: self.folder.type_of(module) for module in group}
        if len(set(types.values())) != 1:
            raise FxquantError(" + ".join(group), f"fused, but of types {types}.", "Give them one type.")
        if types[group[0]] not in (W8A8, W8A8_MIX):
            return
        for suffix in ("input_scale", "input_offset"):
            held = [self.folder.tensor(f"{module}.{suffix}").to(self.folder.dtype) for module in group]
            if any(not torch.equal(held[0], other) for other in held[1:]):
                values = {module: value.item() for module, value in zip(group, held, strict=True)}
                raise FxquantError(" + ".join(group), f"fused, but with {suffix} {values}.", "Calibrate them together.")

    def _expert_type(self, path: ExpertPath) -> str:
        """The one type of an expert's projections and of those of expert 0, the only ones engines look at."""
        modules = [path.module(name) for name in PROJECTIONS]
        modules += [f"{path.parent}.0.{name}" for name in PROJECTIONS if path.index]
        types = {module: self.folder.type_of(module) for module in modules}
        kinds = set(types.values())
        if len(kinds) != 1:
            raise FxquantError(
                path.stored, f"its tensors are of types {types}.", "Give all experts of a layer one type."
            )
        kind = kinds.pop()
        if kind not in EXPERT_TYPES:
            fact = f"{kind}; {self.name} takes {', '.join(EXPERT_TYPES)} for experts."
            raise FxquantError(path.stored, fact, "Use one of them.")
        return kind
