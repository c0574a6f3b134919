"""The JSON files beside the weights: description, config."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import ABSENT, rewritten

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.table import ENGINES, Target
from fxquant.lowering.output_folder.description import (
    description,
    description_size,
    engine_config,
    index,
    index_size,
    json_size,
    write_json,
)
from fxquant.lowering.output_folder.layout import plan_files, stored_tensors
from fxquant.policy.policy import shipped_policies

Tiny = Callable[..., Checkpoint]


@pytest.mark.parametrize("policy", shipped_policies())
def test_the_description_has_one_entry_a_tensor(policy: str, tiny: Tiny) -> None:
    checkpoint = tiny(attention_bias=True)
    program = rewritten(checkpoint, policy)
    files = plan_files(stored_tensors(program, checkpoint), 300_000, ENGINES[Target.ASCEND])
    document = description(program, files, ENGINES[Target.ASCEND])
    stored = {tensor.name: tensor.spec.description for file in files for tensor in file.tensors}
    header = {key: document.pop(key) for key in ("version", "model_quant_type", "group_size")}
    assert document == stored
    assert list(document) == sorted(stored)
    int4 = [recipe.group_size for recipe in program.recipes.values() if recipe.scheme == "W4A8_DYNAMIC"]
    quantized = "FLOAT" if policy == "float" else "W8A8_DYNAMIC"
    assert header == {"version": "1.0.0", "model_quant_type": quantized, "group_size": int4[0] if int4 else 0}


CONFIG_KEYS = {  # policy → mla_quantize, moe_quantize
    "deepseek_w4a8": ("w8a8", "w4a8_dynamic"),
    "deepseek_w4a8_dynamic": ("w8a8_dynamic", "w4a8_dynamic"),
    "deepseek_w4a8_dynamic_rotated": ("w8a8_dynamic", "w4a8_dynamic"),
    "deepseek_w4a8_msmodelslim": ("w8a8", "w4a8_dynamic"),
    "deepseek_w4a8_msmodelslim_per_channel": ("w8a8_dynamic", "w4a8_dynamic"),
    "deepseek_w4a8_per_channel_rotated": ("w8a8_dynamic", "w4a8_dynamic"),
    "deepseek_w4a8_msmodelslim_m4": ("w8a8", "w4a8_dynamic"),
    "deepseek_w4a8_per_channel": ("w8a8_dynamic", "w4a8_dynamic"),
    "deepseek_w4a8_per_channel_static": ("w8a8", "w4a8_dynamic"),
    "deepseek_w4a8_shared_w4": ("w8a8", "w4a8_dynamic"),
    "deepseek_w8a8": ("w8a8", "w8a8_dynamic"),
    "deepseek_w8a8_mix": ("w8a8_mix", "w8a8_dynamic"),
}


@pytest.mark.parametrize("target", Target)
def test_config_has_what_engines_read_without_a_default(target: Target, tiny: Tiny) -> None:
    program = rewritten(tiny(topk_method=ABSENT, moe_layer_freq=ABSENT), "deepseek_w8a8")
    config = engine_config(program, ENGINES[target])
    assert config["topk_method"] == "noaux_tc" and config["moe_layer_freq"] == 1


@pytest.mark.parametrize("policy", shipped_policies())
def test_config_tells_an_engine_what_it_loads(policy: str, tiny: Tiny) -> None:
    checkpoint = tiny(attention_bias=True)
    config = engine_config(rewritten(checkpoint, policy), ENGINES[Target.ASCEND])
    added: dict[str, object] = {"moe_layer_freq": 1, "topk_method": "noaux_tc"}
    if policy != "float":
        mla, moe = CONFIG_KEYS[policy]
        added |= {"quantize": "w8a8_dynamic", "mla_quantize": mla, "moe_quantize": moe}
    assert config == checkpoint.config | added
    assert list(config) == list(checkpoint.config) + list(added)


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "float"])
def test_config_no_longer_says_fp8(policy: str, tiny: Tiny) -> None:
    checkpoint = tiny(fp8=True, attention_bias=True, shards=3)
    assert "quantization_config" in checkpoint.config
    config = engine_config(rewritten(checkpoint, policy), ENGINES[Target.ASCEND])
    assert set(checkpoint.config) - set(config) == {"quantization_config"}
    assert config["torch_dtype"] == "bfloat16"


def test_config_is_silent_about_mixed_schemes(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "extends: deepseek_w4a8_dynamic\n"
        "rules: [{path: '*.layers.1.self_attn.o_proj', scheme: W8A8},"
        " {path: '*.experts.down_proj', scheme: W8A8_DYNAMIC}]"
    )
    config = engine_config(rewritten(tiny(), tmp_path / "policy.yaml"), ENGINES[Target.ASCEND])
    assert not {"mla_quantize", "moe_quantize"} & set(config)
    assert config["quantize"] == "w8a8_dynamic"


def test_json_is_written_for_people_and_diffs(tmp_path: Path) -> None:
    document = {"b": [1, 2.5, None], "a": {"ключ": "é"}}
    write_json(tmp_path / "file.json", document)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == document and list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n") and '\n  "b": [\n' in text and "ключ" in text


@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("size", [300_000, 1 << 30])
def test_sizes_are_those_of_the_files(size: int, target: Target, tiny: Tiny, tmp_path: Path) -> None:
    checkpoint, engine = tiny(attention_bias=True), ENGINES[target]
    program = rewritten(checkpoint, "deepseek_w4a8")
    stored = stored_tensors(program, checkpoint)
    odd = [stored[0]._replace(name=name) for name in ("é", 'a"b', "\t", "漢")]
    files = plan_files([*stored, *odd], size, engine)
    documents = {
        "description": (description(program, files, engine), description_size(program, files, engine)),
        "index": (index(files), index_size(files)),
        "config": (engine_config(program, engine), json_size(engine_config(program, engine))),
    }
    for name, (document, counted) in documents.items():
        write_json(tmp_path / name, document)
        assert (tmp_path / name).stat().st_size == counted, name
    assert all(len(file.header) + file.data_bytes == file.nbytes for file in files)
