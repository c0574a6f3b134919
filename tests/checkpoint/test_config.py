"""config.json: DeepSeek's defaults, both spellings of the rotary keys, and refusals that say what is supported."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny import ABSENT, YARN, tiny_config

from fxquant import ops
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.config import DeepseekV3Config, parse_config, read_config
from fxquant.checkpoint.rope_scaling import yarn_mscale
from fxquant.errors import FxquantError
from fxquant.frontend.source import open_source

PUBLISHED = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 163840,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""From the config.json that DeepSeek publishes with V3."""


def parse(**changes: Any) -> DeepseekV3Config:
    return parse_config(tiny_config(**changes), "config.json")


def test_absent_keys_take_the_published_values() -> None:
    parsed = parse_config({"model_type": "deepseek_v3"}, "config.json")
    assert {key: getattr(parsed, key) for key in PUBLISHED} == PUBLISHED


def test_present_keys_are_taken() -> None:
    given = tiny_config(q_lora_rank=None, eos_token_id=[1, 5], routed_scaling_factor=1.5, rope_theta=5e5)
    parsed = parse_config(given, "config.json")
    assert {key: getattr(parsed, key) for key in given if key in DeepseekV3Config.model_fields} == {
        key: value for key, value in given.items() if key in DeepseekV3Config.model_fields
    }


def test_unknown_keys_are_ignored() -> None:
    assert parse(torch_dtype="bfloat16", use_cache=True, num_atention_heads=7) == parse()


@pytest.mark.parametrize(
    ("model_type", "fact", "way_out"),
    [
        ("deepseek_v2", "router scores with softmax", "fxquant compiles DeepSeek-V3"),
        ("deepseek_v32", "attention is sparse", "fxquant compiles DeepSeek-V3"),
        ("deepseek_v4", "attention is compressed and windowed", "fxquant compiles DeepSeek-V3"),
        ("glm_moe_dsa", "attention is sparse", "fxquant compiles DeepSeek-V3"),
        ("kimi_linear", "linear attention", "fxquant compiles DeepSeek-V3"),
        ("kimi_k25", "vision tower", "is of model_type kimi_k2"),
        ("qwen2", "R1-Distill-Qwen .* dense, without latent attention or experts", "general quantizer"),
        ("qwen3", "R1-0528-Qwen3 .* dense, without latent attention or experts", "general quantizer"),
        ("llama", "R1-Distill-Llama .* dense, without latent attention or experts", "general quantizer"),
    ],
)
def test_neighbours_are_refused_by_name(model_type: str, fact: str, way_out: str) -> None:
    with pytest.raises(FxquantError, match=rf"^config\.json: model_type is '{model_type}': .*{fact}.*\. .*{way_out}"):
        parse(model_type=model_type)


@pytest.mark.parametrize("model_type", ["mixtral", None, 3, ["qwen2"]])
def test_other_architectures_are_refused(model_type: object) -> None:
    with pytest.raises(FxquantError) as caught:
        parse(model_type=model_type)
    assert str(caught.value) == (
        f"config.json: model_type is {model_type!r}. fxquant compiles DeepSeek-V3, DeepSeek-R1 and their family "
        "(model_type deepseek_v3 or kimi_k2)."
    )


def test_absent_model_type_is_refused() -> None:
    with pytest.raises(FxquantError, match="model_type is None"):
        parse(model_type=ABSENT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: .*greater than 0"),
        ({"hidden_size": "many"}, "hidden_size: .*integer"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim: .*multiple of 2"),
        ({"scoring_func": "softmax"}, "scoring_func: .*'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method: .*'noaux_tc'"),
        ({"hidden_act": "gelu"}, "hidden_act: .*'silu'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq: .*1"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: true is not false"),
        ({"rope_interleave": False}, "rope_interleave: false is not true"),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, r"rope_scaling\.type: .*'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, r"rope_scaling\.type: .*'yarn'"),
        ({"rope_scaling": {"type": "yarn"}}, r"rope_scaling\.factor: .*required"),
        ({"rope_scaling": "yarn"}, r"rope_scaling: .*"),
        ({"n_routed_experts": 7}, "7 experts do not form 4 groups"),
        ({"topk_group": 5}, "8 experts do not form 4 groups, 5 kept"),
        ({"num_experts_per_tok": 5}, "5 experts per token do not fit into 2 groups"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_name_the_key_and_what_is_supported(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FxquantError, match=rf"^config\.json: .*{message}.* fxquant compiles DeepSeek-V3"):
        parse(**changes)


# the family


FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
DEEPSEEK_V3 = PUBLISHED | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "quantization_config": FP8, "rope_scaling": YARN | {"original_max_position_embeddings": 4096},
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "moe_layer_freq": 1, "hidden_act": "silu", "tie_word_embeddings": False, "ep_size": 1, "initializer_range": 0.02,
    "attention_dropout": 0.0, "use_cache": True, "transformers_version": "4.33.1",
}  # fmt: skip
KIMI_K2 = DEEPSEEK_V3 | {
    "vocab_size": 163840, "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "num_attention_heads": 64,
    "num_key_value_heads": 64, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827, "rope_theta": 50000.0,
    "max_position_embeddings": 131072, "num_nextn_predict_layers": 0, "bos_token_id": 163584, "eos_token_id": 163585,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.46.3"},
        {"aux_loss_alpha": 0.001, "pretraining_tp": 1, "seq_aux": True},
        {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}, "transformers_version": "4.44.2"},
    ],
    ids=["DeepSeek-V3-0324 and R1-0528", "R1-Zero", "DeepSeek-V3.1"],
)
def test_the_family_has_the_architecture_of_deepseek_v3(tmp_path: Path, changes: dict[str, Any]) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | changes))
    checkpoint = open_checkpoint(tmp_path)
    parsed = parse_config(checkpoint.config, "config.json")
    assert parsed == parse_config(DEEPSEEK_V3, "published")
    assert parsed.softmax_scale == 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert (checkpoint.block, checkpoint.dtype) == ((128, 128), torch.bfloat16)


def test_kimi_k2_under_its_architecture() -> None:
    parsed = parse_config(KIMI_K2, "config.json")
    assert {key: getattr(parsed, key) for key in PUBLISHED} == {key: KIMI_K2[key] for key in PUBLISHED}
    assert parsed.rope_scaling is not None and parsed.rope_scaling.factor == 32.0


@pytest.mark.slow
@pytest.mark.parametrize("config", [DEEPSEEK_V3, KIMI_K2], ids=["DeepSeek-V3", "Kimi-K2"])
def test_the_full_size_is_traced_by_config_alone(config: dict[str, Any], tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = open_source(tmp_path).program()
    moe = config["num_hidden_layers"] - config["first_k_dense_replace"]
    assert [len(gate.args) for gate in program.nodes(ops.moe_gate)] == [7] * moe
    assert sum(parameter.stacked * len(parameter.names) for parameter in program.parameters.values()) == (
        3 * moe * config["n_routed_experts"]
    )


# rotary keys


def test_rope_type_is_another_spelling_of_type() -> None:
    renamed = {"rope_type" if key == "type" else key: value for key, value in YARN.items()}
    assert parse(rope_scaling=renamed) == parse(rope_scaling=YARN)


def test_rope_parameters_of_transformers_5() -> None:
    modern = {"rope_theta": 5e5, "rope_type": "yarn", **YARN}
    assert parse(rope_theta=ABSENT, rope_scaling=ABSENT, rope_parameters=modern) == parse(
        rope_theta=5e5, rope_scaling=YARN
    )


def test_rope_parameters_without_scaling() -> None:
    modern = {"rope_theta": 5e5, "rope_type": "default"}
    assert parse(rope_theta=ABSENT, rope_scaling=ABSENT, rope_parameters=modern) == parse(rope_theta=5e5)


def test_rope_parameters_count_beside_an_empty_rope_scaling() -> None:
    assert parse(rope_scaling=None, rope_parameters={"rope_type": "yarn", **YARN}) == parse(rope_scaling=YARN)


@pytest.mark.parametrize("rope_scaling", [None, YARN], ids=["plain", "yarn"])
def test_what_transformers_saves_means_the_same(tmp_path: Path, rope_scaling: dict[str, Any] | None) -> None:
    from transformers import AutoConfig

    given = tiny_config(rope_scaling=rope_scaling, rope_theta=5e5, max_position_embeddings=40 * 32)
    (tmp_path / "config.json").write_text(json.dumps(given))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "saved")
    assert parse_config(read_config(tmp_path / "saved"), "saved") == parse_config(given, "given")


def test_softmax_scale() -> None:
    assert parse().softmax_scale == 24**-0.5
    assert parse(rope_scaling={**YARN, "mscale_all_dim": 0.0}).softmax_scale == 24**-0.5
    # DeepSeek-V3's own: factor 40, mscale_all_dim 1
    assert parse(rope_scaling=YARN).softmax_scale == 24**-0.5 * (0.1 * math.log(40) + 1) ** 2


def test_yarn_temperature_is_one_without_extension() -> None:
    assert (yarn_mscale(1.0, 1.0), yarn_mscale(0.5, 1.0), yarn_mscale(40.0, 0.0)) == (1.0, 1.0, 1.0)


# the file


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"it has no config\.json\. Pass a Hugging Face checkpoint folder"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"\xff", "not valid UTF-8 at byte 0"),
        (b"[" * 100_000, "nested more than 64 levels deep"),
        (b'{"a": ' + b"9" * 6000 + b"}", "a number of 6,000 characters"),
        (b'{"a": "\\ud800"}', "lone surrogate"),
    ],
    ids=["cut", "empty", "encoding", "nested", "digits", "surrogate"],
)
def test_not_json(tmp_path: Path, content: bytes, fact: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(FxquantError, match=rf"config\.json: .*{fact}"):
        read_config(tmp_path)


def test_not_an_object(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(FxquantError, match="holds a list, not an object"):
        read_config(tmp_path)


def test_no_limit_takes_the_name_of_another() -> None:
    import ast
    from collections import Counter

    import fxquant.inputs.limits

    tree = ast.parse(Path(fxquant.inputs.limits.__file__).read_text())
    names = Counter(target.id for line in tree.body if isinstance(line, ast.Assign) for target in line.targets)
    assert max(names.values()) == 1
