"""DeepSeek's ModelArgs: to Hugging Face's keys and back, the published defaults, and what neither can say."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import YARN, tiny_config
from tiny_names import ARGS

from fxquant.checkpoint.config import parse_config, read_config
from fxquant.checkpoint.model_args import model_args_to_hf
from fxquant.errors import FxquantError
from fxquant.frontend.deepseek_args import hf_to_model_args
from fxquant.models import rotary

CONFIG_671B: dict[str, Any] = {
    "vocab_size": 129280, "dim": 7168, "inter_dim": 18432, "moe_inter_dim": 2048, "n_layers": 61, "n_dense_layers": 3,
    "n_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "n_activated_experts": 8, "n_expert_groups": 8,
    "n_limited_groups": 4, "route_scale": 2.5, "score_func": "sigmoid", "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "dtype": "fp8",
}  # fmt: skip
"""What DeepSeek publishes as config_671B.json."""

DEFAULTS: dict[str, Any] = {
    "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "num_hidden_layers": 27, "first_k_dense_replace": 1, "num_attention_heads": 16, "n_routed_experts": 64,
    "n_shared_experts": 2, "num_experts_per_tok": 6, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
    "rope_theta": 10000.0, "max_position_embeddings": 16384,
}  # fmt: skip
"""The defaults of the published dataclass, in Hugging Face's keys."""

NOT_SAID = {"num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
"""Keys of the config that ModelArgs has no place for and the graph does not depend on."""


def parsed(args: dict[str, Any]) -> dict[str, Any]:
    return parse_config(model_args_to_hf(args), "config.json").model_dump()


# to Hugging Face


def test_the_published_config_is_deepseek_v3() -> None:
    yarn = YARN | {"original_max_position_embeddings": 4096}
    config = {"model_type": "deepseek_v3", "rope_scaling": yarn, "max_position_embeddings": 16384}
    expected = parse_config(config | {"num_nextn_predict_layers": 0}, "expected")
    assert parsed(CONFIG_671B) == expected.model_dump()
    translated = model_args_to_hf(CONFIG_671B)
    assert translated["torch_dtype"] == "bfloat16"
    assert translated["num_key_value_heads"] == 128
    assert translated["quantization_config"] == {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    }  # fmt: skip


def test_power_of_two_scales_are_named() -> None:
    assert model_args_to_hf(CONFIG_671B | {"scale_fmt": "ue8m0"})["quantization_config"]["scale_fmt"] == "ue8m0"


def test_absent_keys_take_the_published_defaults() -> None:
    translated = model_args_to_hf({"score_func": "sigmoid"})
    assert {key: translated[key] for key in DEFAULTS} == DEFAULTS
    assert translated["rope_scaling"] == YARN | {"original_max_position_embeddings": 4096}
    assert "quantization_config" not in translated


@pytest.mark.parametrize(("length", "there"), [(4095, False), (4096, False), (4097, True)])
def test_yarn_beyond_the_original_length(length: int, there: bool) -> None:
    changes = {"max_seq_len": length, "rope_factor": 8, "beta_fast": 30, "beta_slow": 2, "mscale": 0.7}
    yarn = {
        "type": "yarn", "factor": 8, "beta_fast": 30, "beta_slow": 2, "mscale": 0.7, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    assert model_args_to_hf(ARGS | changes)["rope_scaling"] == (yarn if there else None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"score_func": "softmax"}, "score_func: .*'sigmoid'"),
        ({"dtype": "fp16"}, "dtype: 'fp16' is not one of 'bf16', 'fp8'"),
        ({"dim": "many"}, "dim: .*integer"),
        ({"max_seq_len": None}, "max_seq_len: .*integer"),
        ({"rope_factor": 0.5}, "rope_factor: 0.5 is less than 1"),
        ({"indextopk": 2048}, "indextopk: unknown key"),
        ({"index_topk": 2048}, "index_topk: the model's attention is sparse"),
        ({"index_n_heads": 64, "index_head_dim": 128, "scale_fmt": "ue8m0"}, "index_n_heads: .* attention is sparse"),
        ({"compress_ratios": [0, 4], "window_size": 128}, "window_size: the model's attention is compressed"),
    ],
    ids=str,
)
def test_refusals_name_the_file_and_the_key(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(ARGS | changes))
    with pytest.raises(FxquantError, match=rf"{tmp_path}/config\.json: {message}.* ModelArgs"):
        read_config(tmp_path)


def test_without_a_temperature_nothing_is_scaled() -> None:
    config = parse_config(model_args_to_hf(CONFIG_671B | {"mscale": 0.0}), "config.json")
    assert (rotary.attention_factor(config), config.softmax_scale) == (1.0, 192**-0.5)
    assert hf_to_model_args(config)["mscale"] == 0.0


def test_the_default_router_is_refused() -> None:
    with pytest.raises(FxquantError, match="score_func: .*'sigmoid'"):
        model_args_to_hf({key: value for key, value in CONFIG_671B.items() if key != "score_func"})


@pytest.mark.parametrize("changes", [{"model_type": "deepseek_v3"}, {"n_layers": ...}, {"dim": ...}], ids=str)
def test_other_configs_are_left_as_they_are(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {key: value for key, value in (ARGS | changes).items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(tmp_path) == config


# round trips


SIZES = st.integers(1, 64)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """ModelArgs that DeepSeek's inference code runs, with YaRN or without."""
    groups, limited, size = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(SIZES)
    args = {key: draw(SIZES) for key in ("vocab_size", "dim", "inter_dim", "moe_inter_dim", "n_layers", "n_heads")}
    args |= {key: draw(SIZES) for key in ("kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "beta_slow")}
    args |= {key: draw(st.integers(0, 4)) for key in ("n_dense_layers", "n_shared_experts", "q_lora_rank")}
    args |= {key: draw(st.floats(0.25, 4)) for key in ("route_scale", "mscale")}
    args |= {"n_expert_groups": groups, "n_limited_groups": min(groups, limited), "n_routed_experts": groups * size}
    args |= {"n_activated_experts": draw(st.integers(1, min(groups, limited) * size)), "score_func": "sigmoid"}
    args |= {key: draw(st.integers(1, 20_000)) for key in ("max_seq_len", "original_seq_len")}
    args |= {"rope_factor": draw(st.floats(1, 64)), "beta_fast": draw(SIZES)}
    return args | {"rope_theta": draw(st.floats(100, 1e6)), "qk_rope_head_dim": 2 * size}


@given(arguments())
def test_arguments_mean_the_same_after_both_ways(args: dict[str, Any]) -> None:
    config = parse_config(model_args_to_hf(args), "config.json")
    back = hf_to_model_args(config)
    assert model_args_to_hf(back) == model_args_to_hf(args)
    yarn = {"original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale"}
    lost = yarn if args["max_seq_len"] <= args["original_seq_len"] else set()
    assert {key: back[key] for key in set(args) - lost} == {key: args[key] for key in set(args) - lost}


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_a_config_means_the_same_after_both_ways(q_lora_rank: int | None, rope_scaling: dict[str, Any] | None) -> None:
    changes = {"q_lora_rank": q_lora_rank, "rope_scaling": rope_scaling, "num_nextn_predict_layers": 1}
    config = parse_config(tiny_config(**changes, eos_token_id=7), "config.json")
    assert parsed(hf_to_model_args(config)).items() >= config.model_dump(exclude=NOT_SAID).items()


def test_arguments_of_the_published_config() -> None:
    config = parse_config(model_args_to_hf(CONFIG_671B), "config.json")
    assert hf_to_model_args(config, "fp8").items() >= CONFIG_671B.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias True: it is always False"),
        ({"norm_topk_prob": False}, "norm_topk_prob False: it is always True"),
        ({"rope_scaling": YARN | {"attention_factor": 1.25}}, r"attention_factor 1\.25: cos and sin"),
        ({"rope_scaling": YARN | {"mscale": None}}, r"mscale None and mscale_all_dim 1\.0"),
        ({"rope_scaling": YARN | {"truncate": False}}, "truncate false: it is always true"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05: it is always 1e-06"),
        ({"rope_scaling": YARN | {"mscale": 0.5}}, r"mscale 0\.5 and mscale_all_dim 1\.0"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"YaRN of factor 0\.5"),
        ({"rope_scaling": YARN, "max_position_embeddings": 32}, "YaRN for 32 positions"),
    ],
    ids=str,
)
def test_configs_that_arguments_cannot_say(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FxquantError, match=rf"config\.json: ModelArgs cannot express {message}"):
        hf_to_model_args(parse_config(tiny_config(**changes), "config.json"))
