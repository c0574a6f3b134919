"""Released vllm-ascend loads compiled folders by its own code: policies, ranks and parallelism, a process a release."""

from dataclasses import dataclass

import pytest
from contract_view import refused
from outcome import Outcome, Verdict
from planted_faults import Fault, plant, seen
from recorded import CONTRACT_GAPS, NOTICED, REFUSED_SPLIT, TOO_STRICT, UNREAD, Trait, as_recorded, stumbles
from vllm_ascend_folders import Made, make
from vllm_ascend_runs import RELEASES, outcomes

pytestmark = pytest.mark.engines


@dataclass(frozen=True)
class Found:
    """All outcomes, and what they are of."""

    outcomes: list[Outcome]
    made: Made

    def traits(self, outcome: Outcome) -> frozenset[Trait]:
        return self.made.traits[outcome.policy]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    made = make(tmp_path_factory.mktemp("engines"))
    return Found(outcomes(RELEASES, made.runs), made)


def test_every_release_does_what_was_found_before(found: Found) -> None:
    """Loaded: what the engine holds is the graph's. Equal: so is what it computes, and what our reader makes of it."""
    assert len(found.outcomes) == len(RELEASES) * len(found.made.runs)
    assert [outcome for outcome in found.outcomes if not as_recorded(outcome, found.traits(outcome))] == []


def test_what_was_found_is_not_of_no_run(found: Found) -> None:
    """Every line of the record is the reason of some outcome, and most outcomes have none."""
    reasons = {stumble for one in found.outcomes for stumble in stumbles(one, found.traits(one))[:1]}
    assert {stumble.trait for stumble in reasons} == set(Trait) - {Trait.FLOAT16, Trait.NOTHING}
    verdicts = [outcome.verdict for outcome in found.outcomes]
    assert verdicts.count(Verdict.EQUAL) > len(verdicts) / 5


def test_contracts_refuse_what_a_release_refuses_and_nothing_else(found: Found) -> None:
    """Of multi-token prediction and of sources' dtypes contracts say nothing of their own."""
    assert all("refuses it" in words for words in found.made.refused.values())
    gaps, too_strict = set(), set()
    for one in found.outcomes:
        source = found.made.sources[one.policy]
        if source.mtp != "none" or source.model:
            continue
        ours, loads = refused(source, found.made.checkpoint, one.ranks, one.parallel), one.verdict.loads
        if ours is None and not loads:
            gaps.add((one.release, stumbles(one, found.traits(one))[0].trait, one.parallel))
        if ours is not None and loads:
            too_strict |= {(one.release, trait, one.parallel) for trait in REFUSED_SPLIT & found.traits(one)} or {
                (one, ours)
            }
    assert gaps == CONTRACT_GAPS, "mend the contract, or take the line out that it has caught up with"
    assert too_strict == TOO_STRICT


def test_faults_in_the_bytes_are_served(tmp_path_factory: pytest.TempPathFactory) -> None:
    """By the newest release; that verification names each of them is tests/verification/test_corruption.py."""
    planted: list[Fault] = list(plant(tmp_path_factory.mktemp("faults"), verify=False))
    verdicts = {key: of_release[RELEASES[-1]].verdict for key, of_release in seen(planted, RELEASES[-1:]).items()}
    assert {key for key, verdict in verdicts.items() if verdict is Verdict.REFUSED} == NOTICED
    assert {key for key, verdict in verdicts.items() if verdict.loads} == UNREAD
    assert len(verdicts) - len(NOTICED) - len(UNREAD) > 30
