"""Policies: files that extend others, which rule decides, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from assigned import Assign, assigner, scheme_of

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import ActivationStatistic, CalibrationWeights, Policy, Rule, load_policy
from fxquant.policy.unused_rules import Decided

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write("rules: …")`: the path of such a policy file, named policy.yaml unless `name` says otherwise."""

    def policy_file(text: str, name: str = "policy") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return policy_file


@pytest.fixture
def assign(tiny: Callable[..., Checkpoint]) -> Assign:
    return assigner(tiny)


# extending


def test_own_rules_come_before_inherited_ones(write: Write, assign: Assign) -> None:
    policy = load_policy(write("extends: deepseek_w4a8\nrules: [{path: '*.0.mlp.up_proj', scheme: W8A8}]"))
    assert [str(rule) for rule in policy.own] == ["*.0.mlp.up_proj → W8A8"]
    assert policy.inherited == load_policy("deepseek_w4a8").rules
    assert policy.rules == policy.own + policy.inherited
    program = assign(policy)
    assert scheme_of(program, "0.mlp.up_proj") == "W8A8"
    assert scheme_of(program, "0.mlp.gate_proj") == "W8A8_DYNAMIC"


def test_settings_are_inherited_unless_given(write: Write) -> None:
    inherits = load_policy(write("extends: deepseek_w4a8_msmodelslim"))
    assert inherits.activation_statistic is ActivationStatistic.BATCH_MEAN
    assert inherits.calibration_weights is CalibrationWeights.ROUNDED
    text = "extends: deepseek_w4a8_msmodelslim\nactivation_statistic: min_max\ncalibration_weights: float"
    gives = load_policy(write(text))
    assert gives.activation_statistic is ActivationStatistic.MIN_MAX
    assert gives.calibration_weights is CalibrationWeights.FLOAT


def test_a_chain_of_files(write: Write) -> None:
    first = write("rules: [{kind: norm, scheme: FLOAT}]", "first")
    second = write(f"extends: {first}\nrules: [{{kind: gate, scheme: FLOAT}}]", "second")
    third = load_policy(write(f"extends: {second}\nrules: [{{kind: head, scheme: FLOAT}}]", "third"))
    assert (third.name, [rule.kind for rule in third.rules]) == ("third", [(Kind.HEAD,), (Kind.GATE,), (Kind.NORM,)])


def test_an_empty_file_is_a_policy_without_rules(write: Write, assign: Assign) -> None:
    policy = load_policy(write(""))
    assert policy.rules == ()
    with pytest.raises(FxquantError, match="no rule covers"):
        assign(policy)


# which rule


def rule(**fields: object) -> Rule:
    return Rule.model_validate({"scheme": "FLOAT", **fields})


def policy_of(*own: Rule, inherited: tuple[Rule, ...] = ()) -> Policy:
    return Policy(
        name="test",
        description="",
        activation_statistic=ActivationStatistic.MIN_MAX,
        calibration_weights=CalibrationWeights.FLOAT,
        own=own,
        inherited=inherited,
    )


@pytest.mark.parametrize(
    ("fields", "selected"),
    [
        ({"kind": "norm"}, False),
        ({"kind": "attention"}, True),
        ({"kind": ["norm", "attention"]}, True),
        ({"path": "*.o_proj"}, True),
        ({"path": "o_proj"}, False),
        ({"path": "*.O_proj"}, False),
        ({"kind": "norm", "path": "*.o_proj"}, False),
        ({"kind": "attention", "path": "*.q_proj"}, False),
        ({"kind": "attention", "path": "*.o_proj"}, True),
        ({"path": "*.[0-4].*"}, True),
    ],
)
def test_a_rule_selects_by_kind_and_path(fields: dict[str, object], selected: bool) -> None:
    assert rule(**fields).selects("model.layers.3.self_attn.o_proj", Kind.ATTENTION) is selected


def test_the_first_rule_decides_and_quantizing_ones_pass_over_what_is_no_linear() -> None:
    int8, float_rule = rule(kind="attention", scheme="W8A8"), rule(path="*")
    policy = policy_of(int8, float_rule)
    assert policy.rule_for("a.o_proj", Kind.ATTENTION, quantizable=True) is int8
    assert policy.rule_for("a.scale", Kind.ATTENTION, quantizable=False) is float_rule
    assert policy_of(float_rule, int8).rule_for("a.o_proj", Kind.ATTENTION, quantizable=True) is float_rule
    assert policy_of(int8).rule_for("a.norm", Kind.NORM, quantizable=True) is None


def test_a_rule_as_text() -> None:
    assert str(rule(kind=["norm", "gate"])) == "norm, gate → FLOAT"
    text = str(rule(kind="routed_expert", path="*.3.*", scheme="W4A8_DYNAMIC", group_size=64))
    assert text == "routed_expert at *.3.* → W4A8_DYNAMIC group_size 64"


# rules that decide nothing

MODULES = [
    Decided("a.o_proj", Kind.ATTENTION, True, rule(path="*")),
    Decided("a.norm", Kind.NORM, False, rule(path="*")),
]


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(
        FxquantError, match=r"policy test: rule “gate → FLOAT” the model has no module of that kind"
    ) as caught:
        policy_of(rule(path="*"), rule(kind="gate")).unused_rules([rule(path="*")], MODULES)
    assert "optional: true" in caught.value.remedy


def test_an_own_rule_behind_another_is_refused() -> None:
    with pytest.raises(
        FxquantError, match=r"“norm → FLOAT” selects a\.norm, but earlier rules match first: “\* → FLOAT”"
    ):
        policy_of(rule(path="*"), rule(kind="norm")).unused_rules([rule(path="*")], MODULES)


def test_optional_and_overridden_rules_are_listed() -> None:
    everything, optional, overridden = rule(path="*"), rule(kind="mtp", optional=True), rule(kind="norm")
    policy = policy_of(everything, optional, inherited=(overridden,))
    assert policy.unused_rules([everything], MODULES) == [optional, overridden]
    assert policy.unused_rules([everything, optional, overridden], MODULES) == []


def test_an_inherited_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(FxquantError, match="“gate → FLOAT” the model has no module"):
        policy_of(rule(path="*"), inherited=(rule(kind="gate"),)).unused_rules([rule(path="*")], MODULES)


def test_unused_rules_of_a_real_model(assign: Assign, write: Write) -> None:
    assert [str(idle) for idle in assign("deepseek_w4a8").unused_rules] == ["mtp → LEAVE_OUT"]
    program = assign("deepseek_w4a8", n_shared_experts=0, first_k_dense_replace=0)
    assert [idle.kind for idle in program.unused_rules] == [(Kind.DENSE_MLP,), (Kind.SHARED_EXPERT,), (Kind.MTP,)]
    with pytest.raises(FxquantError, match=r"rule “\*\.q_c_proj → FLOAT” matches no path"):
        assign(write("extends: deepseek_w4a8\nrules: [{path: '*.q_c_proj', scheme: FLOAT}]"))


def test_a_linear_that_no_rule_covers_is_refused(assign: Assign, write: Write) -> None:
    policy = write("rules: [{kind: attention, scheme: W8A8_DYNAMIC}]")
    with pytest.raises(FxquantError, match=r"no rule covers model\.layers\.0\.mlp\.gate_proj \(dense_mlp\)") as caught:
        assign(policy)
    assert caught.value.place == "policy policy"
    assert "kind dense_mlp or path model.layers.0.mlp.gate_proj" in caught.value.remedy


def test_a_norm_that_no_rule_covers_is_refused(assign: Assign, write: Write) -> None:
    kinds = "[attention, dense_mlp, shared_expert, routed_expert, head, gate, embedding]"
    with pytest.raises(FxquantError, match=r"no rule covers \S+norm \(norm\)"):
        assign(write(f"rules: [{{kind: {kinds}, scheme: FLOAT}}]"))


@pytest.mark.parametrize("kind", ["attention", "norm"])
def test_nothing_that_the_graph_reads_is_left_out(kind: str, assign: Assign, write: Write) -> None:
    with pytest.raises(FxquantError, match="LEAVE_OUT") as caught:
        assign(write(f"extends: deepseek_w4a8\nrules: [{{kind: {kind}, scheme: LEAVE_OUT}}]"))
    assert caught.value.place == "policy policy"


# group sizes


@pytest.mark.parametrize("sizes", [(256, 128), (256, 0)])
def test_two_group_sizes_in_a_file_are_refused(sizes: tuple[int, int], write: Write) -> None:
    rules = [f"{{path: '*.{size}', scheme: W4A8_DYNAMIC, group_size: {size}}}" for size in sizes]
    with pytest.raises(FxquantError, match=r"has group sizes \d+, 256\."):
        load_policy(write(f"rules: [{', '.join(rules)}]"))


def test_two_group_sizes_in_a_model_are_refused(write: Write, assign: Assign) -> None:
    """An own rule takes some experts, the inherited one keeps the others; the weight file has one group_size."""
    own = "{kind: routed_expert, path: '*.up_proj', scheme: W4A8_DYNAMIC, group_size: 128}"
    policy = load_policy(write(f"extends: deepseek_w4a8\nrules: [{own}]"))
    with pytest.raises(FxquantError, match=r"group sizes \[128, 256\]"):
        assign(policy)


def test_one_group_size_may_replace_the_inherited_one(write: Write, assign: Assign) -> None:
    own = "{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}"
    program = assign(write(f"extends: deepseek_w4a8\nrules: [{own}]"))
    assert scheme_of(program, "1.mlp.experts.down_proj") == "W4A8_DYNAMIC group_size 64"
