"""`group_size: auto`: one size for a model, the target's or one scale per channel, with the reason."""

from collections.abc import Callable
from pathlib import Path

import pytest
from assigned import scheme_of
from tiny import float_program

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.passes import AssignSchemes, choices
from fxquant.policy.group_sizes import choose
from fxquant.policy.policy import load_policy
from fxquant.policy.rule import Rule
from fxquant.program.program import Program
from fxquant.schemes.schemes import WeightAlgorithm

EXPERTS = {"kind": "routed_expert", "scheme": "W4A8_DYNAMIC"}
UP, DOWN = "1.mlp.experts.up_proj", "1.mlp.experts.down_proj"


def test_the_size_is_the_targets_or_none() -> None:
    assert choose("x", 256, {"a": 512, "b": 256}).size == 256
    assert choose("x", 0, {"a": 512}).why == "group_size auto → 0: x loads one scale per channel"
    narrow = choose("x", 256, {"a": 512, "b": 384})
    assert narrow.size == 0 and "in_features 384 of b is not a multiple of 256" in narrow.why


def test_a_rule_gets_a_size_and_the_algorithm_that_goes_with_it() -> None:
    rule = Rule.model_validate(EXPERTS | {"group_size": "auto", "algorithm": "clip"})
    assert str(rule) == "routed_expert → W4A8_DYNAMIC group_size auto by clip"
    assert str(rule.sized(256)) == "routed_expert → W4A8_DYNAMIC group_size 256 by clip"
    assert str(rule.sized(0)) == "routed_expert → W4A8_DYNAMIC by clip"
    other = rule.model_copy(update={"per_channel_algorithm": WeightAlgorithm.LEAST_SQUARES})
    assert other.sized(256) == rule.sized(256)
    assert str(other.sized(0)) == "routed_expert → W4A8_DYNAMIC by least_squares"
    explicit = Rule.model_validate(EXPERTS | {"group_size": 64})
    assert explicit.sized(0) is explicit


@pytest.mark.parametrize(
    ("keys", "fact"),
    [
        ({"group_size": -1}, "-1 is not one of 0, 32, 64, 128, 256 or auto"),
        ({"group_size": 256, "per_channel_algorithm": "clip"}, "per_channel_algorithm is for group_size: auto"),
        ({"scheme": "W8A8", "group_size": "auto"}, "group_size is for W4A8_DYNAMIC, not for W8A8"),
    ],
)
def test_what_a_rule_may_not_say(keys: dict, fact: str) -> None:
    with pytest.raises(ValueError, match=fact):
        Rule.model_validate(EXPERTS | keys)


@pytest.fixture
def assigned(tiny: Callable[..., Checkpoint]) -> Callable[..., tuple[Program, list[str]]]:
    """`assigned(policy, size)`: the program for a target of that size, and what was chosen."""

    def run(policy: str, size: int, **model: object) -> tuple[Program, list[str]]:
        program = float_program(tiny(**model))
        result = AssignSchemes(load_policy(policy), int4_group_size=size, target="it")(program)
        return program, choices([result])

    return run


def test_a_policy_fits_targets_with_groups_and_without(assigned: Callable) -> None:
    for size, scheme in ((256, "W4A8_DYNAMIC group_size 256"), (0, "W4A8_DYNAMIC")):
        program, (choice,) = assigned("deepseek_w4a8", size)
        assert {scheme_of(program, name) for name in (UP, DOWN)} == {scheme} and f"auto → {size}" in choice
    assert assigned("deepseek_w8a8", 256)[1] == []


def test_one_narrow_linear_takes_the_groups_from_all(assigned: Callable) -> None:
    program, (choice,) = assigned("deepseek_w4a8", 256, moe_intermediate_size=192)
    assert {scheme_of(program, name) for name in (UP, DOWN)} == {"W4A8_DYNAMIC"}
    assert "in_features 192 of model.layers.1.mlp.experts.down_proj is not a multiple of 256" in choice


def test_auto_beside_an_explicit_size_must_agree(tmp_path: Path, assigned: Callable) -> None:
    own = "{kind: routed_expert, path: '*.up_proj', scheme: W4A8_DYNAMIC, group_size: 256}"
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"extends: deepseek_w4a8\nrules: [{own}]")
    assert scheme_of(assigned(str(policy), 256)[0], UP) == "W4A8_DYNAMIC group_size 256"
    with pytest.raises(FxquantError, match=r"group sizes \[0, 256\]"):
        assigned(str(policy), 0)
