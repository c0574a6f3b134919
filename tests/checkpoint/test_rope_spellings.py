"""Rotary keys in every spelling: frequencies, factor of cos and sin, and softmax scale are transformers' own."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ABSENT, tiny_config

from fxquant import ops
from fxquant.checkpoint.config import parse_config, read_config
from fxquant.checkpoint.config_notes import config_notes
from fxquant.errors import FxquantError
from fxquant.frontend.source import source_of_config
from fxquant.models import rotary
from fxquant.program.operands import operand

YARN: dict[str, Any] = {
    "type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
SIZES: dict[str, Any] = {
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "max_position_embeddings": 163840, "rope_theta": ABSENT,
    "rope_scaling": ABSENT,
}  # fmt: skip
MODERN = {"rope_theta": 5e4, **YARN, "rope_type": "yarn"}


def yarn(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**YARN, **changes}.items() if value is not ABSENT}


READ: dict[str, dict[str, Any]] = {
    "nothing": {},
    "theta": {"rope_theta": 5e4},
    "an integer theta": {"rope_theta": 50000},
    "null": {"rope_theta": 5e4, "rope_scaling": None},
    "type": {"rope_scaling": yarn()},
    "rope_type": {"rope_scaling": yarn(type=ABSENT, rope_type="yarn")},
    "both types": {"rope_scaling": yarn(rope_type="yarn")},
    "rope_type wins": {"rope_scaling": yarn(type="linear", rope_type="yarn")},
    "rope_type default wins": {"rope_scaling": yarn(rope_type="default")},
    "default type": {"rope_theta": 5e4, "rope_scaling": {"type": "default"}},
    "default rope_type": {"rope_scaling": {"rope_type": "default", "rope_theta": 3e4}},
    "theta inside, no type": {"rope_scaling": {"rope_theta": 3e4}},
    "theta inside": {"rope_scaling": yarn(rope_theta=5e4)},
    "theta inside wins": {"rope_theta": 1e5, "rope_scaling": yarn(rope_theta=5e4)},
    "modern, default": {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}},
    "modern, theta alone": {"rope_parameters": {"rope_theta": 5e4}},
    "modern, yarn": {"rope_parameters": MODERN},
    "modern, type alone": {"rope_parameters": {"rope_theta": 5e4, **YARN}},
    "modern, theta outside": {"rope_theta": 7e4, "rope_parameters": yarn()},
    "modern, theta on both sides": {"rope_theta": 7e4, "rope_parameters": MODERN},
    "modern beside an empty scaling": {"rope_scaling": {}, "rope_parameters": MODERN},
    "modern beside null": {"rope_scaling": None, "rope_theta": 1e4, "rope_parameters": MODERN},
    "empty modern": {"rope_theta": 7e4, "rope_parameters": {}},
    "scaling wins": {"rope_scaling": yarn(factor=8), "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}},
    "default scaling wins": {"rope_scaling": {"type": "default"}, "rope_parameters": MODERN},
    "attention_factor": {"rope_scaling": yarn(attention_factor=1.3)},
    "an integer attention_factor": {"rope_scaling": yarn(attention_factor=2)},
    "attention_factor of 1": {"rope_parameters": {**MODERN, "mscale": 0.5, "attention_factor": 1.0}},
    "attention_factor null": {"rope_scaling": yarn(attention_factor=None)},
    "not truncated": {"rope_scaling": yarn(truncate=False)},
    "truncated": {"rope_scaling": yarn(truncate=True)},
    "modern, not truncated": {"rope_parameters": {**MODERN, "truncate": False, "beta_fast": 20.0, "beta_slow": 3}},
    "mscale alone": {"rope_scaling": yarn(mscale=0.5, mscale_all_dim=ABSENT)},
    "mscale_all_dim alone": {"rope_scaling": yarn(mscale=ABSENT)},
    "no mscales": {"rope_scaling": yarn(mscale=ABSENT, mscale_all_dim=ABSENT)},
    "mscales of 0": {"rope_scaling": yarn(mscale=0, mscale_all_dim=0.0)},
    "mscales of null": {"rope_scaling": yarn(mscale=None, mscale_all_dim=None)},
    "two mscales": {"rope_scaling": yarn(mscale=0.707, mscale_all_dim=0.5)},
    "betas of null": {"rope_scaling": yarn(beta_fast=None, beta_slow=None)},
    "no betas": {"rope_scaling": yarn(beta_fast=ABSENT, beta_slow=ABSENT)},
    "equal betas": {"rope_scaling": yarn(beta_fast=1.0, beta_slow=1.0, factor=32.0, rope_theta=50000.0)},
    "no original length": {"rope_scaling": yarn(original_max_position_embeddings=ABSENT)},
    "no length": {
        "max_position_embeddings": ABSENT,
        "rope_scaling": yarn(original_max_position_embeddings=ABSENT),
    },
    "original length outside": {"original_max_position_embeddings": 8192, "rope_scaling": yarn()},
    "factor null": {"rope_scaling": yarn(factor=None, mscale_all_dim=ABSENT)},
    "factor below 1": {"rope_scaling": yarn(factor=0.5)},
    "keys that nothing reads": {"rope_scaling": yarn(finetuned=True)},
    "partial_rotary_factor of 1": {"partial_rotary_factor": 1.0, "rope_parameters": MODERN},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling.type: 'linear' is not 'yarn'"),
    "modern, linear": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters.type: 'linear'"),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type: 'dynamic'"),
    "no type": ({"rope_scaling": yarn(type=ABSENT)}, "rope_scaling.rope_type: missing beside factor"),
    "rope_type null": ({"rope_scaling": yarn(rope_type=None)}, "rope_scaling.rope_type: missing"),
    "no factor": ({"rope_scaling": yarn(factor=ABSENT)}, "rope_scaling.factor: required"),
    "factor null with a temperature": ({"rope_scaling": yarn(factor=None)}, "rope_scaling.factor: empty"),
    "theta null": ({"rope_theta": None}, "rope_theta: empty, not a number"),
    "modern, theta null": ({"rope_parameters": {"rope_theta": None}}, "rope_parameters.rope_theta: empty"),
    "truncate null": ({"rope_scaling": yarn(truncate=None)}, "rope_scaling.truncate: empty"),
    "no positions": ({"rope_scaling": yarn(attention_factor=0.0)}, "rope_scaling.attention_factor: 0.0 is not greater"),
    "original null": ({"rope_scaling": yarn(original_max_position_embeddings=None)}, "embeddings: empty"),
    "partial": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5: part of the rotary features"),
    "partial inside": ({"rope_scaling": yarn(partial_rotary_factor=0.5)}, "rope_scaling.partial_rotary_factor: 0.5: "),
    "another width": ({"head_dim": 128}, "head_dim: 128 is not 64: transformers takes it for qk_rope_head_dim"),
    "longrope": (
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "factor": 2.0}},
        "rope_scaling.short_factor: a list: ",
    ),
    "scaled queries": ({"rope_parameters": {**MODERN, "llama_4_scaling_beta": 0.1}}, "llama_4_scaling_beta: 0.1: "),
    "by layer": ({"rope_parameters": {"full_attention": MODERN}}, "rope_parameters.full_attention: a mapping"),
    "a list": ({"rope_scaling": [1]}, "rope_scaling: a list, not a mapping"),
    "text": ({"rope_parameters": "yarn"}, "rope_parameters: 'yarn', not a mapping"),
    "false": ({"rope_scaling": False}, "rope_scaling: false, not a mapping"),
}


def config(changes: dict[str, Any]) -> dict[str, Any]:
    return tiny_config(**{**SIZES, **changes})


def theirs(document: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    """Frequencies, factor of cos and sin, and softmax scale of transformers' modules."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    read = modeling.DeepseekV3Config.from_dict(json.loads(json.dumps(document)))
    embedding = modeling.DeepseekV3RotaryEmbedding(read)
    return embedding.inv_freq, embedding.attention_scaling, modeling.DeepseekV3Attention(read, 0).scaling


def ours(document: dict[str, Any]) -> tuple[torch.Tensor, float, float]:
    parsed = parse_config(document, "config.json")
    return torch.tensor(rotary.frequencies(parsed)), rotary.attention_factor(parsed), parsed.softmax_scale


def test_the_table_is_long_enough() -> None:
    assert len(READ) >= 30


@pytest.mark.parametrize("changes", READ.values(), ids=READ)
def test_a_spelling_means_what_it_means_to_transformers(changes: dict[str, Any]) -> None:
    document = config(changes)
    frequencies, scale, softmax = theirs(document)
    own, own_scale, own_softmax = ours(document)
    # float32: a power, a division by it, by the factor, and two products and their sum, each rounded once
    torch.testing.assert_close(own, frequencies, rtol=6 * 2.0**-24, atol=0)
    # float64: a logarithm, two sums, two products and a division
    assert own_scale == pytest.approx(scale, rel=6 * 2.0**-53)
    assert own_softmax == pytest.approx(softmax, rel=6 * 2.0**-53)


@pytest.mark.parametrize("name", ["theta inside", "attention_factor", "modern, not truncated", "default scaling wins"])
def test_they_are_those_of_the_graph(name: str) -> None:
    document = config({**READ[name], "torch_dtype": "float32"})
    frequencies, scale, softmax = ours(document)
    program = source_of_config(document, Path("config.json")).program()
    (table,), attention = program.nodes(ops.rope_table), program.nodes(ops.mla_attention)
    assert torch.equal(torch.tensor(operand(table, "inv_freq")), frequencies) and operand(table, "scale") == scale
    assert {operand(node, "softmax_scale") for node in attention} == {softmax}


@pytest.mark.parametrize(("changes", "fact"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_read_is_refused_by_its_key(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(FxquantError) as caught:
        parse_config(config(changes), "config.json")
    assert caught.value.place == "config.json" and fact in caught.value.fact, caught.value


@pytest.mark.parametrize("changes", READ.values(), ids=READ)
def test_a_config_that_is_given_to_transformers_means_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    """build_model(config) may pass on `config.model_dump()`, and save what it built."""
    modeling = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    parsed = parse_config(config(changes), "config.json")
    modeling.DeepseekV3Config(**parsed.model_dump()).save_pretrained(tmp_path)
    (frequencies, *scales), (saved, *saved_scales) = ours(config(changes)), ours(read_config(tmp_path))
    assert torch.equal(frequencies, saved) and scales == saved_scales


def test_absent_keys_are_not_passed_on() -> None:
    dumped = parse_config(config(READ["mscales of null"]), "config.json").model_dump()["rope_scaling"]
    assert not {"mscale", "mscale_all_dim", "attention_factor"} & set(dumped)


# what is said of a config that is read


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_scaling": yarn(finetuned=True)}, "may change the model: rope_scaling.finetuned"),
        ({"rope_scaling": yarn(rope_type="default")}, "rope_scaling.factor, rope_scaling.mscale, "),
        (READ["scaling wins"], "rope_scaling counts, not rope_parameters"),
        (READ["theta inside wins"], "DeepSeek's own code takes rope_theta 100000.0, not 50000"),
        (READ["attention_factor"], "cos and sin times 1, not 1.3"),
        (READ["mscale alone"], "cos and sin times 1.18444, not 1.36889"),
        (READ["not truncated"], "truncate true, not false"),
        (READ["no original length"], "original_max_position_embeddings 4096, not 163840"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_another_reading_is_told(changes: dict[str, Any], said: str) -> None:
    assert any(said in note for note in config_notes(config(changes))), config_notes(config(changes))


ALIKE = ("nothing", "theta", "type", "rope_type", "modern, yarn", "equal betas", "two mscales")


@pytest.mark.parametrize("name", ALIKE)
def test_of_what_all_read_alike_nothing_is_told(name: str) -> None:
    assert config_notes(config(READ[name])) == []


def test_the_published_config_needs_no_word() -> None:
    published = resources.files("fxquant") / "models/deepseek_v3_671b.json"
    assert config_notes(json.loads(published.read_text())) == []
