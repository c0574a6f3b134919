"""What released vllm-ascend does with our folders, as it was found by running it, and where our contracts differ.

A release that does something else, or a contract that is mended, fails a test: then change the lines here.
"""

import re
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from outcome import Outcome, Verdict
from vllm_ascend_runs import COMPUTED_ON

from fxquant.lowering.output_folder.manifest import GRAPH
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.schemes.schemes import Scheme


class Trait(StrEnum):
    """What in a folder an engine may stumble over."""

    TWO_LEVEL = "two-level experts"
    PER_CHANNEL = "per-channel int4 experts"
    INT4_LINEAR = "int4 linears outside experts"
    MIXED = "W8A8_MIX"
    FLOAT16 = "float16"
    NOTHING = "nothing quantized"


@dataclass(frozen=True)
class Stumble:
    """Releases that fail on folders with a trait, or load them wrongly, from a number of ranks on; words: a pattern."""

    releases: tuple[str, ...]
    trait: Trait
    parallel: tuple[str, ...]
    ranks: int
    verdict: Verdict
    words: str


TP, EP = ("tp",), ("ep",)
GROUPS_ON = 8
"""Ranks from which the tiny model's four groups of down_proj can't be dealt out."""
STUMBLES = (
    Stumble(("0.11.0",), Trait.MIXED, TP + EP, 1, Verdict.REFUSED, "only supports following quant types"),
    # 0.13: brackets are missing, so that scale_bias is sharded where there are groups, and only there
    Stumble(("0.13.0",), Trait.PER_CHANNEL, TP, 2, Verdict.REFUSED, "must match the size|doesn't match the broadcast"),
    # from 0.13 on the first-level scale [n, 1] of down_proj is sharded like groups: ranks from 1 on find nothing
    Stumble(("0.13.0", "0.18.0"), Trait.TWO_LEVEL, TP, 2, Verdict.REFUSED, "exceeds dimension size|start out of range"),
    # the same, and vLLM 0.23 copies nothing where there is nothing: uninitialised memory is served
    Stumble(("0.23.0",), Trait.TWO_LEVEL, TP, 2, Verdict.WRONG, "w2 scale: 100% of it|4 groups of k on"),
    Stumble(("0.11.0",), Trait.TWO_LEVEL, TP, GROUPS_ON, Verdict.WRONG, "4 groups of k on"),
    Stumble(
        ("0.11.0", "0.13.0", "0.18.0", "0.23.0"), Trait.INT4_LINEAR, TP + EP, GROUPS_ON, Verdict.WRONG,
        "shared_experts.down_proj: 4 groups of k on",
    ),
)  # fmt: skip
"""The most severe of those that apply is expected."""

CONTRACT_GAPS = {
    ("0.11.0", Trait.MIXED, "tp"),
    ("0.11.0", Trait.MIXED, "ep"),
    ("0.13.0", Trait.PER_CHANNEL, "tp"),
}
"""Release, trait, parallelism: our contracts, which are of all releases, accept some ranks that the release does not.
Of each `but` of the release tells."""
REFUSED_SPLIT = {Trait.TWO_LEVEL}
"""What our contract refuses where ranks split it."""
TOO_STRICT = {("0.11.0", Trait.TWO_LEVEL, "tp")}
"""The other way round: refused for all releases, where this one loads it on some ranks."""


def traits(folder: Path) -> frozenset[Trait]:
    """Of a compiled folder."""
    program = load_program(folder / GRAPH)
    return frozenset(_traits(program))


def draft_traits(folder: Path) -> frozenset[Trait]:
    """Of its multi-token prediction layer alone, whose experts are int8."""
    schemes = {recipe.scheme for recipe in load_program(folder / GRAPH).mtp.recipes.values()}
    found = {Trait.MIXED} if Scheme.W8A8_MIX in schemes else set()
    return frozenset(found if schemes else {Trait.NOTHING})


def _traits(program: Program) -> set[Trait]:
    found = set() if program.recipes else {Trait.NOTHING}
    if str(program.dtype) == "torch.float16":
        found.add(Trait.FLOAT16)
    for recipe in program.recipes.values():
        expert = program.parameters[recipe.weight_target].kind is Kind.ROUTED_EXPERT
        if recipe.scheme is Scheme.W8A8_MIX:
            found.add(Trait.MIXED)
        if recipe.int4 and not expert:
            found.add(Trait.INT4_LINEAR)
        if recipe.int4 and expert:
            found.add(Trait.TWO_LEVEL if recipe.group_size else Trait.PER_CHANNEL)
    return found


def stumbles(outcome: Outcome, of_folder: frozenset[Trait]) -> list[Stumble]:
    """Those that apply to a run, the most severe first."""
    order = (Verdict.REFUSED, Verdict.WRONG)
    applying = [
        stumble
        for stumble in STUMBLES
        if outcome.release in stumble.releases
        and stumble.trait in of_folder
        and outcome.parallel in stumble.parallel
        and outcome.ranks >= stumble.ranks
    ]
    return sorted(applying, key=lambda stumble: order.index(stumble.verdict))


def as_recorded(outcome: Outcome, of_folder: frozenset[Trait]) -> bool:
    """Whether the verdict is that of what is recorded, and the words are among those recorded."""
    applying = stumbles(outcome, of_folder)
    if applying:
        patterns = [stumble.words for stumble in applying]
        return outcome.verdict is applying[0].verdict and any(re.search(words, outcome.words) for words in patterns)
    if {Trait.FLOAT16, Trait.NOTHING} & of_folder or outcome.ranks not in COMPUTED_ON:
        # of float16 models npu_quant_matmul gets a scale in float16, which it is not documented to take
        return outcome.verdict is Verdict.LOADED
    return outcome.verdict is Verdict.EQUAL


TWO, ONE = "two-level", "per channel"
NOTICED = {
    ("extra tensor in a module", TWO), ("extra tensor in a module", ONE),
    ("extra tensor of no module", TWO), ("extra tensor of no module", ONE),
    ("group_size stale", TWO),
}  # fmt: skip
"""Faults in the bytes that the newest release stops at."""
UNREAD = {
    # all ranks' columns are added up where experts are whole
    ("scale_bias columns one rank on", TWO), ("two scale_bias columns swapped", TWO),
    *(
        (fault, form)
        for form in (TWO, ONE)
        for fault in (
            "weight_offset not zero", "type of one tensor stale", "type of one module stale",
            "moe_quantize of config.json stale",
        )
    ),
    # a scale made by the reference tool's newer form is one of bfloat16 in any case
    ("weight_scale in bfloat16", ONE),
}  # fmt: skip
"""Faults of which it holds and computes nothing else: it asks for the types of expert 0 alone. All others it serves."""
