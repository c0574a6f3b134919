"""Released SGLang loads compiled folders by its own code: what it holds and computes, our emulation, our contract.

A release stops, or serves other numbers than the graph's, exactly where the contract refuses before a weight is read,
and where the emulation does.
"""

from collections.abc import Callable
from typing import Any

import pytest
from sglang_cases import PER_CHANNEL, RELEASES, STATIC, Folders, run
from sglang_runs import DRAFT_LAYOUTS, DRAFTS, Shown, refused_by_contract, serves, shown

pytestmark = pytest.mark.engines

Found = dict[str, tuple[Shown, dict[str, Any]]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Found]:
    """`found(release)`: what it did with each case, by the case's name."""
    place = tmp_path_factory.mktemp("sglang")
    cases, done = shown(Folders(place)), {}

    def get(release: str) -> Found:
        if release not in done:
            findings = run(release, [one.case for one in cases], place / f"{release}.json")
            done[release] = {one.name: (one, finding) for one, finding in zip(cases, findings, strict=True)}
        return done[release]

    return get


@pytest.mark.parametrize("release", RELEASES)
def test_the_contract_refuses_what_a_release_does_not_serve_and_nothing_else(
    found: Callable[[str], Found], release: str
) -> None:
    disagree = {}
    for name, (one, finding) in found(release).items():
        refused = refused_by_contract(one)
        if (refused is None) != serves(finding):
            fact = "accepted" if refused is None else refused.fact
            disagree[name] = f"contract: {fact}; release: {finding['stopped'] or finding['wrong'][:2] or 'equal'}"
    assert not disagree


@pytest.mark.parametrize("release", RELEASES)
def test_the_emulation_reads_what_a_release_holds_and_refuses_the_rest(
    found: Callable[[str], Found], release: str
) -> None:
    disagree = {}
    for name, (_, finding) in found(release).items():
        loads = serves(finding)
        if loads and (finding["emulated"] or finding["differs"] or not finding["compared"]):
            disagree[name] = finding["emulated"] or finding["differs"][:3] or "nothing was compared"
        if not loads and not finding["emulated"]:
            disagree[name] = f"read, but: {finding['stopped'] or finding['wrong'][:2]}"
    assert not disagree


@pytest.mark.parametrize("release", RELEASES)
def test_second_scales_are_skipped_with_a_warning_and_garbage_is_served(
    found: Callable[[str], Found], release: str
) -> None:
    finding = found(release)["groups_of_256, bf16, mtp none on 1 tp"][1]
    skipped = {name.rpartition(".")[2] for name in finding["skipped"]}
    assert skipped == {f"{half}_weight_{what}_second" for half in ("w13", "w2") for what in ("scale", "offset")}
    assert not finding["stopped"] and any("output error 0.9" in text for text in finding["wrong"])


@pytest.mark.parametrize("release", RELEASES)
def test_split_experts_add_the_whole_scale_bias_on_every_rank(found: Callable[[str], Found], release: str) -> None:
    for ranks in (2, 4, 8, 16):
        wrong = found(release)[f"{PER_CHANNEL}, bf16, mtp none on {ranks} tp"][1]["wrong"]
        assert wrong and all(".down_proj on rank" in text for text in wrong), (ranks, wrong[:3])


@pytest.mark.parametrize("release", RELEASES)
def test_a_float16_scale_is_what_stops_a_float16_model(found: Callable[[str], Found], release: str) -> None:
    """The release loads it; the operator that it hands its per-token scales takes none in float16."""
    for policy in (PER_CHANNEL, STATIC):
        stopped = found(release)[f"{policy}, fp16, mtp none on 1 tp"][1]["stopped"]
        assert stopped == "ValueError: npu_quant_matmul: scale is torch.float16"


@pytest.mark.parametrize("release", RELEASES)
def test_a_draft_is_served_with_the_quantization_it_was_compiled_for(
    found: Callable[[str], Found], release: str
) -> None:
    for policy, mtp in DRAFTS:
        for ranks, parallel in DRAFT_LAYOUTS:
            finding = found(release)[f"{policy}, bf16, mtp {mtp}, its draft on {ranks} {parallel}"][1]
            assert serves(finding) and finding["compared"], finding
