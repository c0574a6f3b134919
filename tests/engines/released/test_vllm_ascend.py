"""Released vllm-ascend loads compiled folders by its own code: policies, ranks and parallelism, a process a release."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from contract_view import refused
from folders import Source, compiled, sources
from outcome import Outcome, Verdict
from recorded import CONTRACT_GAPS, Trait, as_recorded, stumbles, traits
from vllm_ascend_runs import RELEASES, Run, every_way, outcomes

from fxquant import FxquantError

pytestmark = pytest.mark.engines
DRAFT = " draft"


@dataclass(frozen=True)
class Found:
    """All outcomes, and what they are of: run's name → source, traits of its folder."""

    outcomes: list[Outcome]
    sources: dict[str, Source]
    traits: dict[str, frozenset[Trait]]
    checkpoint: Path


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    root = tmp_path_factory.mktemp("engines")
    runs: list[Run] = []
    of_name: dict[str, Source] = {}
    of_folder: dict[str, frozenset[Trait]] = {}
    for source in sources():
        folder = compiled(source, root)
        if isinstance(folder, FxquantError):
            assert "refuses it" in folder.fact, f"{source.name}: {folder}"
            continue
        for name, draft in ((source.name, False), (source.name + DRAFT, True)):
            if not draft or source.mtp != "none":
                runs += every_way(name, folder, draft)
                of_name[name], of_folder[name] = source, frozenset() if draft else traits(folder)
    return Found(outcomes(RELEASES, runs), of_name, of_folder, root / "model ")


def test_every_release_does_what_was_found_before(found: Found) -> None:
    assert len(found.outcomes) == len(RELEASES) * len(found.sources) * 9
    other = [outcome for outcome in found.outcomes if not as_recorded(outcome, found.traits[outcome.policy])]
    assert other == []


def test_what_was_found_is_not_of_no_run(found: Found) -> None:
    """Every line of the record is the reason of some outcome, and most outcomes have none."""
    seen = {stumble for one in found.outcomes for stumble in stumbles(one, found.traits[one.policy])[:1]}
    assert {stumble.trait for stumble in seen} == set(Trait) - {Trait.FLOAT16}
    verdicts = [outcome.verdict for outcome in found.outcomes]
    assert verdicts.count(Verdict.EQUAL) > len(verdicts) / 5


def test_contracts_refuse_what_a_release_refuses_and_nothing_else(found: Found) -> None:
    """Of multi-token prediction and of sources' dtypes contracts say nothing of their own."""
    gaps, too_strict = set(), []
    for one in found.outcomes:
        source = found.sources[one.policy]
        if source.mtp != "none" or source.model:
            continue
        ours, loads = refused(source, found.checkpoint, one.ranks, one.parallel), one.verdict.loads
        if ours is None and not loads:
            gaps.add((one.release, stumbles(one, found.traits[one.policy])[0].trait, one.parallel))
        if ours is not None and loads:
            too_strict.append((one, ours))
    assert gaps == CONTRACT_GAPS, "mend the contract, or take the line out that it has caught up with"
    assert too_strict == []
