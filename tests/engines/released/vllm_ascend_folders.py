"""All runs of the matrix: every folder, which of its runs are made, and what fxquant refuses to compile."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from folders import Source, compiled, sources
from recorded import Trait, draft_traits, traits
from vllm_ascend_runs import COMPUTED_ON, RANKS, Run, every_way

from fxquant import FxquantError
from fxquant.engines.table import Target

DRAFT = " draft"
"""End of the name of a run of the multi-token prediction layer, as the draft model that an engine makes of it."""


@dataclass(frozen=True)
class Made:
    """runs      all of them
    sources   name of a run → what was compiled
    traits    name of a run → what in its folder an engine may stumble over; a draft has none of the model's experts
    refused   source's name → fxquant's words, where there is no folder
    """

    checkpoint: Path
    runs: list[Run] = field(default_factory=list)
    sources: dict[str, Source] = field(default_factory=dict)
    traits: dict[str, frozenset[Trait]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def make(root: Path) -> Made:
    """Compiles every folder into `root`."""
    made = Made(root / "model ")
    for source in sources():
        folder = compiled(source, root)
        if isinstance(folder, FxquantError):
            made.refused[source.name] = f"{folder.place}: {folder.fact}"
            continue
        for name, runs in _runs(source, folder):
            made.runs.extend(runs)
            made.sources[name] = source
            made.traits[name] = draft_traits(folder) if name.endswith(DRAFT) else traits(folder)
    return made


def _runs(source: Source, folder: Path) -> Iterator[tuple[str, list[Run]]]:
    """On fewer ranks variants of a policy, and what both targets write alike; draft models on all."""
    variant = source.mtp != "none" or source.model
    alike = source.target is Target.ASCEND and Trait.TWO_LEVEL not in traits(folder)
    yield source.name, every_way(source.name, folder, ranks=COMPUTED_ON if variant or alike else RANKS)
    if source.mtp != "none":
        yield source.name + DRAFT, every_way(source.name + DRAFT, folder, mtp=True)
