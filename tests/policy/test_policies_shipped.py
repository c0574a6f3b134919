"""The policies that come with fxquant: what each gives to each kind, on every member of the family."""

from collections.abc import Callable

import pytest
from assigned import Assign, assigner, scheme_of

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import LEAVE_OUT, ActivationStatistic, CalibrationWeights, load_policy, shipped_policies
from fxquant.schemes.schemes import Scheme, WeightAlgorithm

STATIC, DYNAMIC, INT4_256, INT4 = "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC group_size 256", "W4A8_DYNAMIC"
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
SHIPPED = {  # policy → attention, dense MLP, shared expert, routed expert
    "deepseek_w4a8": (STATIC, DYNAMIC, STATIC, INT4_256),
    "deepseek_w4a8_dynamic": (DYNAMIC, DYNAMIC, DYNAMIC, INT4_256),
    "deepseek_w4a8_dynamic_rotated": (DYNAMIC, DYNAMIC, DYNAMIC, INT4_256),
    "deepseek_w4a8_msmodelslim": (STATIC, DYNAMIC, DYNAMIC, INT4_256),
    "deepseek_w4a8_msmodelslim_m4": (STATIC, DYNAMIC, DYNAMIC, INT4_256),
    "deepseek_w4a8_msmodelslim_per_channel": (DYNAMIC, DYNAMIC, DYNAMIC, INT4),
    "deepseek_w4a8_per_channel": (DYNAMIC, DYNAMIC, DYNAMIC, INT4),
    "deepseek_w4a8_per_channel_rotated": (DYNAMIC, DYNAMIC, DYNAMIC, INT4),
    "deepseek_w4a8_per_channel_static": (STATIC, DYNAMIC, DYNAMIC, INT4),
    "deepseek_w4a8_shared_w4": (STATIC, DYNAMIC, INT4_256, INT4_256),
    "deepseek_w8a8": (STATIC, DYNAMIC, DYNAMIC, DYNAMIC),
    "deepseek_w8a8_mix": ("W8A8_MIX", DYNAMIC, DYNAMIC, DYNAMIC),
    "float": ("FLOAT", "FLOAT", "FLOAT", "FLOAT"),
}
PREDICTION = {"deepseek_w4a8_msmodelslim_per_channel": Scheme.W8A8_DYNAMIC}
"""Policy → what it gives to multi-token prediction layers; the others leave them out."""
SEARCHED = {
    "deepseek_w4a8", "deepseek_w4a8_msmodelslim_per_channel", "deepseek_w4a8_per_channel",
    "deepseek_w4a8_per_channel_rotated", "deepseek_w4a8_per_channel_static", "deepseek_w4a8_shared_w4",
}  # fmt: skip
KV_B = "attention at *.kv_b_proj → FLOAT"
SHARED, EXPERTS = "shared_expert → W8A8", "routed_expert → W4A8_DYNAMIC group_size auto by clip"
OVERRIDDEN = {  # policy → inherited rules that its own leave without a module
    "deepseek_w4a8_dynamic": {KV_B, "attention → W8A8", SHARED, EXPERTS},
    "deepseek_w4a8_dynamic_rotated": {KV_B, "attention → W8A8", SHARED, EXPERTS},
    "deepseek_w4a8_per_channel_rotated": {KV_B, "attention → W8A8", SHARED, EXPERTS},
    "deepseek_w4a8_per_channel": {KV_B, "attention → W8A8", SHARED, EXPERTS},
    "deepseek_w4a8_per_channel_static": {
        KV_B, "attention → W8A8_DYNAMIC", SHARED, EXPERTS,
    },
    "deepseek_w4a8_shared_w4": {SHARED},
    "deepseek_w8a8": {SHARED, EXPERTS},
    "deepseek_w8a8_mix": {KV_B, "attention → W8A8", SHARED, EXPERTS},
}  # fmt: skip


@pytest.fixture
def assign(tiny: Callable[..., Checkpoint]) -> Assign:
    return assigner(tiny)


def test_the_table_names_every_shipped_policy() -> None:
    assert shipped_policies() == sorted(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_policy_loads_and_describes_itself(name: str) -> None:
    policy = load_policy(name)
    own = policy.own != () or name.endswith(("_m4", "_rotated"))  # which only smooth or rotate
    assert (policy.name, policy.description.strip() != "", own) == (name, True, True)
    batch_mean = name != "float"
    assert policy.activation_statistic is ActivationStatistic("batch_mean" if batch_mean else "min_max")
    rounded = name in ("deepseek_w4a8_msmodelslim", "deepseek_w4a8_msmodelslim_m4")
    assert policy.calibration_weights is CalibrationWeights("rounded" if rounded else "float")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_shipped_policy_does_about_outliers(name: str) -> None:
    """Calibrated policies smooth, rotated ones need not; the reference tool's script does nothing, and the quickest and
    the data-free one say that they do nothing."""
    policy = load_policy(name)
    nothing = not policy.smooth and not policy.rotate and name != "float"
    expected = {"deepseek_w4a8_dynamic", "deepseek_w4a8_msmodelslim", "deepseek_w4a8_per_channel"}
    assert nothing == (name in expected)
    said = "nothing against outliers" in " ".join(policy.description.split())
    assert said == nothing
    routed = policy.rule_for("model.layers.1.mlp.experts.up_proj", Kind.ROUTED_EXPERT, True)
    assert routed is not None
    assert (routed.algorithm is not WeightAlgorithm.MIN_MAX) == (name in SEARCHED)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_a_shipped_policy_gives_to_each_kind(name: str, assign: Assign) -> None:
    program = assign(name, mtp=("model.layers.2",))
    attention, dense, shared, routed = SHIPPED[name]
    expected = {f"{layer}.self_attn.{linear}": attention for layer in (0, 1) for linear in ATTENTION}
    expected |= {f"{layer}.self_attn.kv_b_proj": "FLOAT" for layer in (0, 1)}
    for block, scheme in (("0.mlp", dense), ("1.mlp.shared_experts", shared), ("1.mlp.experts", routed)):
        expected |= {f"{block}.{projection}": scheme for projection in ("gate_proj", "up_proj", "down_proj")}
    assert {module: scheme_of(program, module) for module in expected} == expected
    assert set(program.recipes) == {f"model.layers.{module}" for module, s in expected.items() if s != "FLOAT"}
    floats = {
        "model.embed_tokens",
        "model.norm",
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.0.input_layernorm",
    }
    assert {program.rules[module].scheme for module in floats} == {Scheme.FLOAT}
    assert program.rules["model.layers.2"].scheme == PREDICTION.get(name, LEAVE_OUT)
    overridden = {str(idle) for idle in program.unused_rules}
    assert overridden == OVERRIDDEN.get(name, set())


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize(
    ("options", "mtp"),
    [
        ({"q_lora_rank": None}, ()),
        ({"n_shared_experts": 0}, ()),
        ({"first_k_dense_replace": 0}, ()),
        ({"num_nextn_predict_layers": 1}, ("model.layers.2",)),
    ],
    ids=["q_proj", "no shared expert", "no dense layer", "mtp"],
)
def test_a_shipped_policy_fits_every_member_of_the_family(
    name: str, options: dict[str, object], mtp: tuple[str, ...], assign: Assign
) -> None:
    program = assign(name, mtp, **options)
    assert (len(program.recipes) == 0) == (name == "float")
    assert all(program.rules[module].scheme == PREDICTION.get(name, LEAVE_OUT) for module in mtp)
