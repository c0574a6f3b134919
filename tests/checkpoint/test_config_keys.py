"""Keys of config.json besides sizes: each changes nothing, is refused by name, or is reported."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_config, write_checkpoint

from fxquant.api import compile, plan
from fxquant.checkpoint.config import parse_config
from fxquant.checkpoint.config_keys import CHANGES, INERT
from fxquant.checkpoint.config_notes import config_notes
from fxquant.compilation.options import CompileOptions
from fxquant.errors import FxquantError

REMOTE = {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "auto_map": REMOTE,
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "pretraining_tp": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "scoring_func": "sigmoid", "seq_aux": True, "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
MOONLIGHT = V3 | {
    "bos_token_id": 163584, "eos_token_id": 163586, "first_k_dense_replace": 1, "hidden_size": 2048,
    "intermediate_size": 11264, "max_position_embeddings": 8192, "moe_intermediate_size": 1408, "n_group": 1,
    "n_routed_experts": 64, "n_shared_experts": 2, "num_attention_heads": 16, "num_experts_per_tok": 6,
    "num_hidden_layers": 27, "num_key_value_heads": 16, "num_nextn_predict_layers": 0, "q_lora_rank": None,
    "quantization_config": None, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 50000.0,
    "routed_scaling_factor": 2.446, "topk_group": 1, "transformers_version": "4.46.3", "vocab_size": 163840,
}  # fmt: skip
KIMI_K2 = V3 | {
    "model_type": "kimi_k2", "bos_token_id": 163584, "eos_token_id": 163585, "first_k_dense_replace": 1,
    "max_position_embeddings": 131072, "n_group": 1, "n_routed_experts": 384, "num_attention_heads": 64,
    "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "routed_scaling_factor": 2.827,
    "topk_group": 1, "vocab_size": 163840,
    "rope_scaling": {**V3["rope_scaling"], "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
}  # fmt: skip
PUBLISHED = {
    "DeepSeek-V3": V3,
    "DeepSeek-V3.1": V3 | {"quantization_config": V3["quantization_config"] | {"scale_fmt": "ue8m0"}},
    "Moonlight-16B-A3B": MOONLIGHT,
    "Kimi-K2-Instruct": KIMI_K2,
}


def parse(**changes: Any) -> Any:
    return parse_config(tiny_config(**changes), "config.json")


# read, or known


@pytest.mark.parametrize("config", PUBLISHED.values(), ids=PUBLISHED)
def test_every_key_of_published_configs_is_known(config: dict[str, Any]) -> None:
    assert config_notes(config) == []


def test_every_key_that_transformers_writes_is_known() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.DeepseekV3Config(num_attention_heads=4, num_key_value_heads=4)
    sampling = transformers.GenerationConfig._get_default_generation_params()
    assert config_notes({**config.to_dict(), "dtype": "bfloat16", **dict.fromkeys(sampling)}) == []


@pytest.mark.parametrize("key", sorted(INERT))
def test_what_changes_nothing_is_passed_over(key: str) -> None:
    assert parse(**{key: 3}).model_dump(exclude={key}) == parse().model_dump(exclude={key})


def test_second_names_are_read() -> None:
    config = tiny_config(num_local_experts=16, num_mtp_layers=2)
    del config["n_routed_experts"], config["num_nextn_predict_layers"]
    parsed = parse_config(config, "config.json")
    assert (parsed.n_routed_experts, parsed.num_nextn_predict_layers) == (16, 2)
    assert parse(num_local_experts=8) == parse()
    with pytest.raises(FxquantError, match="num_local_experts: 16 beside n_routed_experts: 8, which is the same"):
        parse(num_local_experts=16)


def test_null_shared_experts_are_none() -> None:
    assert parse(n_shared_experts=None) == parse(n_shared_experts=0)


def test_transformers_gets_as_many_key_value_heads_as_heads() -> None:
    assert parse().model_dump()["num_key_value_heads"] == 4
    assert parse().model_copy(update={"num_attention_heads": 2}).model_dump()["num_key_value_heads"] == 2


# refused


@pytest.mark.parametrize("key", CHANGES)
def test_what_would_change_the_model_is_refused_by_its_key(key: str) -> None:
    with pytest.raises(FxquantError) as caught:
        parse(**{key: 7})
    assert caught.value.fact.startswith(f"{key}: 7: ") and CHANGES[key][0] in caught.value.fact
    assert "remove the key" in caught.value.remedy


@pytest.mark.parametrize("key", CHANGES)
def test_it_is_taken_where_it_says_nothing(key: str) -> None:
    for value in CHANGES[key][1]:
        assert config_notes(tiny_config(**{key: value})) == []


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types: a list: "),
        ({"mlp_layer_types": ["dense", "sparse"]}, "mlp_layer_types: a list: "),
        # Instella-MoE, of model_type deepseek_v3
        ({"farskip": True, "gated_attention": True}, "gated_attention: true: attention would be gated. farskip: true"),
        ({"head_dim": 128}, "head_dim: 128 is not 8"),
        ({"qk_head_dim": 25}, "qk_head_dim: 25 is not 24"),
        ({"rotary_dim": True}, "rotary_dim: true is not 8"),
        ({"index_topk": 2048, "swiglu_limit": 7.0, "use_mla": False, "qk_norm": True}, "qk_norm"),
        ({"hidden_act": "gelu_new"}, "hidden_act: 'gelu_new'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: true"),
    ],
    ids=str,
)
def test_another_model_is_refused(changes: dict[str, Any], fact: str) -> None:
    with pytest.raises(FxquantError) as caught:
        parse(**changes)
    assert fact in caught.value.fact or "And 1 more." in caught.value.fact


def test_a_list_of_full_attention_is_the_model() -> None:
    sizes = {"layer_types": ["full_attention"] * 2, "head_dim": 8, "qk_head_dim": 24, "rotary_dim": 8}
    assert config_notes(tiny_config(**sizes)) == []


# reported


def test_an_unknown_key_is_named_with_a_similar_one() -> None:
    (note,) = config_notes(tiny_config(num_atention_heads=7, router_temperature=2.0))
    assert note == (
        "config.json: keys that are not read and may change the model: "
        "num_atention_heads (did you mean num_attention_heads?), router_temperature"
    )


def test_many_keys_are_counted() -> None:
    (note,) = config_notes(tiny_config(**{f"zz{number}": 1 for number in range(20)}))
    assert note.endswith("zz6, zz7 and 12 more")


def test_a_million_keys_are_counted_at_once() -> None:
    start = time.process_time()
    (note,) = config_notes({**tiny_config(), **dict.fromkeys(map(str, range(10**6)), 1)})
    assert note.endswith("6, 7 and 999992 more") and time.process_time() - start < 10


def test_heads_that_latent_attention_has_not() -> None:
    (note,) = config_notes(tiny_config(num_key_value_heads=1))
    assert note.startswith("config.json: num_key_value_heads: 1 is not 4")


def test_another_architecture_of_this_model_type() -> None:
    (note,) = config_notes(tiny_config(architectures=["InstellaMoEForCausalLM"]))
    assert note == "config.json: the graph is that of DeepseekV3ForCausalLM, whatever InstellaMoEForCausalLM does"
    assert config_notes(tiny_config(architectures=None)) == config_notes(tiny_config(architectures=[3])) == []


def test_two_dtypes() -> None:
    (note,) = config_notes(tiny_config(torch_dtype="bfloat16", dtype="float16"))
    assert note == "config.json: torch_dtype 'bfloat16' counts, not dtype 'float16'"
    assert config_notes(tiny_config(torch_dtype="bfloat16", dtype="bfloat16")) == []


def test_reports_have_the_note(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", router_temperature=2.0)
    options = CompileOptions(policy="float", out=tmp_path / "out", verify=False)
    notes = config_notes(json.loads((folder / "config.json").read_text()))
    assert len(notes) == 1 and "router_temperature" in notes[0]
    assert compile(folder, options).notes[:1] == notes
    assert plan(folder / "config.json", options).as_json()["notes"] == notes
