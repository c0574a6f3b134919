"""A rule that decides nothing: the error tells the usual mistakes apart, and names what is near."""

from collections.abc import Callable
from pathlib import Path

import pytest
from assigned import Assign, assigner
from tiny import float_program

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.passes import AssignSchemes, PairSmoothing
from fxquant.policy.policy import load_policy

MLP = "model.layers.1.mlp"
EXPERTS = f"{MLP}.experts"
TAKEN = "but earlier rules match first"


@pytest.fixture
def assign(tiny: Callable[..., Checkpoint]) -> Assign:
    return assigner(tiny)


@pytest.fixture
def policy(tmp_path: Path) -> Callable[[str], str]:
    def written(text: str) -> str:
        (tmp_path / "mine.yaml").write_text(text)
        return str(tmp_path / "mine.yaml")

    return written


CASES = [
    # no such path
    ("path: '*.q_c_proj', scheme: FLOAT", "matches no path", "Similar: *.q_b_proj, *.q_a_proj"),
    ("path: model.layers.0.self_attn.qa_proj, scheme: W8A8", "matches no path", "model.layers.0.self_attn.q_a_proj"),
    ("path: mdel.layers.1.mlp.*, scheme: W8A8", "matches no path", "Similar: model.layers.1.mlp.*"),
    ("path: '*.Experts.*', scheme: W8A8", "matches no path", "Similar: *.experts.*"),
    ("path: model.layers.7.*, scheme: W8A8", "model.layers is followed by 0, 1.", "optional: true"),
    ("path: model.layers.0.mlp.z.*, scheme: W8A8", "model.layers.0.mlp is followed by gate_proj, up_proj", ""),
    ("path: zzz, scheme: FLOAT", "matches no path", "Paths begin with lm_head, model"),
    # single experts
    (f"path: {EXPERTS}.3.*, scheme: W8A8_DYNAMIC", "names single experts", f"Write path: {EXPERTS}.gate_proj, or"),
    (f"path: {EXPERTS}.3, scheme: W8A8_DYNAMIC", "names single experts", f"{EXPERTS}.*"),
    ("path: '*.experts.[0-3].up_proj', scheme: FLOAT", "names single experts", f"{EXPERTS}.up_proj"),
    # a missing .*
    ("path: model.layers.1, scheme: FLOAT", "not the modules in it", "Write path: model.layers.1.*"),
    (f"path: {EXPERTS}, scheme: W8A8_DYNAMIC", f"matches a parent of {EXPERTS}.gate_proj", f"Write path: {EXPERTS}.*"),
    ("path: '*.mlp', scheme: W8A8_DYNAMIC", "not the modules in it", "Write path: *.mlp.*"),
    # other ways to name what is there
    ("path: self_attn.o_proj, scheme: W8A8_DYNAMIC", "matches no whole path", "Write path: '*.self_attn.o_proj'"),
    ("path: '*.o_proj.weight', scheme: W8A8_DYNAMIC", "matches tensors", "Write path: *.o_proj"),
    # no linears
    ("kind: norm, scheme: W8A8", "and 8 more (norm), but W8A8 is for linears only", "scheme: FLOAT"),
    ("path: model.embed_tokens, scheme: W8A8_DYNAMIC", "selects model.embed_tokens (embedding), but W8A8", "FLOAT"),
    ("path: '*.mlp.gate', scheme: W8A8_DYNAMIC", "(gate), but W8A8_DYNAMIC is for", "FLOAT"),
    # kinds
    ("kind: mtp, path: '*', scheme: FLOAT", "of kind attention, dense_mlp", "Correct the kind"),
    ("kind: norm, path: '*.o_proj', scheme: FLOAT", "model.layers.0.self_attn.o_proj and 1 more, of kind att", ""),
    ("kind: other, scheme: FLOAT", "the model has no module of that kind; it has attention, dense_mlp", "optional"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "fact", "way_out"), CASES, ids=lambda text: text[:45])
def test_the_mistake_is_named(rule: str, fact: str, way_out: str, assign: Assign, policy: Callable[[str], str]) -> None:
    with pytest.raises(FxquantError) as caught:
        assign(policy(f"extends: deepseek_w4a8\nrules:\n- {{{rule}}}"))
    assert caught.value.place.endswith("mine.yaml:3")
    assert fact in caught.value.fact and way_out in caught.value.remedy, caught.value
    assert len(str(caught.value)) < 700


def test_an_earlier_rule_is_named(assign: Assign, policy: Callable[[str], str]) -> None:
    text = (
        "extends: deepseek_w4a8\nrules:\n- {kind: routed_expert, scheme: FLOAT}\n- {path: '*.experts.*', scheme: W8A8}"
    )
    with pytest.raises(FxquantError, match=rf"selects {EXPERTS}\.gate_proj and 2 more, {TAKEN}") as caught:
        assign(policy(text))
    assert "“routed_expert → FLOAT”" in caught.value.fact and "Move it before" in caught.value.remedy
    assert caught.value.place.endswith(":4")


def test_only_what_it_may_decide_counts_as_taken(assign: Assign, policy: Callable[[str], str]) -> None:
    """Of the attention's modules a quantizing rule may not decide the norms, so the rule that has them took nothing."""
    rules = "- {path: '*_proj*', scheme: FLOAT}\n- {kind: attention, scheme: W8A8_MIX}"
    with pytest.raises(FxquantError, match=TAKEN) as caught:
        assign(policy(f"extends: deepseek_w4a8\nrules:\n{rules}"))
    assert "q_a_proj and 9 more" in caught.value.fact and "“*_proj* → FLOAT”." in caught.value.fact


@pytest.mark.parametrize(
    ("rule", "fact", "way_out"),
    [
        ("path: '*.q_c_proj', method: flex", "matches no path", "*.q_b_proj"),
        ("path: model.layers.1, method: flex", "not the modules in it", "model.layers.1.*"),
        (f"path: {EXPERTS}.0.*, method: flex", "names single experts", ""),
        ("kind: embedding, method: flex", "model.embed_tokens reads no output of a norm, an attention or a swiglu", ""),
        ("kind: norm, path: '*.o_proj', method: flex", "path and kind exclude each other", ""),
        ("path: '*.kv_b_proj', method: flex", "kv_b_proj and 1 more reads no output", ""),
        ("path: lm_head, method: flex", "for the input of lm_head, all its consumers stay in float", ""),
        ("kind: routed_expert, pair: linear, method: flex", "reads from a norm, not from a linear", "Use pair: norm"),
        ("kind: gate, method: flex", "the selected ones stay in float", ""),
    ],
    ids=lambda text: text[:45],
)
def test_the_mistake_of_a_smoothing_rule_is_named(
    rule: str, fact: str, way_out: str, tiny: Callable[..., Checkpoint], policy: Callable[[str], str]
) -> None:
    loaded, program = load_policy(policy(f"extends: deepseek_w4a8\nsmooth:\n- {{{rule}}}")), float_program(tiny())
    AssignSchemes(loaded)(program)
    with pytest.raises(FxquantError) as caught:
        PairSmoothing(loaded)(program)
    assert caught.value.place.endswith("mine.yaml:3")
    assert fact in caught.value.fact and way_out in caught.value.remedy, caught.value


def test_an_earlier_smoothing_rule_is_named(tiny: Callable[..., Checkpoint], policy: Callable[[str], str]) -> None:
    text = "extends: deepseek_w4a8\nsmooth:\n- {method: flex}\n- {kind: attention, method: smoothquant}"
    loaded, program = load_policy(policy(text)), float_program(tiny())
    AssignSchemes(loaded)(program)
    with pytest.raises(FxquantError, match="earlier rules match first: “everything → flex”"):
        PairSmoothing(loaded)(program)
