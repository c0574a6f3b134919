"""What MindIE-LLM would refuse or misread, told by its reader."""

from pathlib import Path

import pytest
import torch
from open_readers import open_reader
from reader_folders import EXPERTS, Draft

from fxquant.engine_readers import Arithmetic
from fxquant.engines.mindie.reader import open_mindie
from fxquant.errors import FxquantError

ATTENTION = "model.layers.0.self_attn"
LINEAR = f"{ATTENTION}.q_a_proj"
DOWN = f"{EXPERTS}.1.down_proj"


def experts(group: int = 0, packed: bool = True) -> Draft:
    draft = Draft()
    draft.expert_layer(256, 256, group, packed)
    return draft


def test_older_mindie_wants_group_size_and_unpacked_weights(tmp_path: Path) -> None:
    packed, engine = experts(256).for_mindie_2_1rc1(256), "mindie-2.1rc1"
    with pytest.raises(FxquantError, match=r"weight_scale: F32 \[256, 1\]; .*\[128, 1\]|has no parameter"):
        open_reader(engine, packed.write(tmp_path / "packed")).expert_linear(DOWN, row_parallel=True)
    draft = experts(256, packed=False).for_mindie_2_1rc1(256)
    open_reader(engine, draft.write(tmp_path / "right")).expert_linear(DOWN, row_parallel=True)
    draft.config["quantization_config"] = {}
    with pytest.raises(FxquantError, match="group_size None in quantization_config"):
        open_reader(engine, draft.write(tmp_path / "size")).expert_linear(DOWN, row_parallel=True)


def test_mindie_wants_its_model_type_scale_bias_and_group_sizes(tmp_path: Path) -> None:
    draft = experts(256).for_mindie(256)
    open_reader("mindie", draft.write(tmp_path / "right")).expert_linear(DOWN, row_parallel=True)
    offsets = [name for name in draft.tensors if "_offset" in name]
    for name in offsets:  # it reads by name, and never these
        del draft.tensors[name], draft.types[name]
    open_reader("mindie", draft.write(tmp_path / "offsets")).expert_linear(DOWN, row_parallel=True)
    bias = draft.tensors.pop(f"{DOWN}.scale_bias")
    with pytest.raises(FxquantError, match=r"down_proj.scale_bias: missing"):
        open_reader("mindie", draft.write(tmp_path / "bias")).expert_linear(DOWN, row_parallel=True)
    draft.tensors[f"{DOWN}.scale_bias"] = bias
    del draft.header["group_size"], draft.config["quantization_config"]
    open_reader("mindie", draft.write(tmp_path / "no size")).expert_linear(DOWN, row_parallel=True)
    draft.header["group_size"] = 32
    with pytest.raises(FxquantError, match="group_size 32; MindIE takes 0, 64, 128, 256"):
        open_reader("mindie", draft.write(tmp_path / "size"))
    draft.config["model_type"] = "deepseek_v3"
    with pytest.raises(FxquantError, match="MindIE runs DeepSeek as deepseekv2"):
        open_reader("mindie", draft.write(tmp_path / "type"))


def test_mindie_takes_the_shared_expert_in_four_bits_only_with_the_routed_ones(tmp_path: Path) -> None:
    shared = "model.layers.3.mlp.shared_experts"
    draft = experts(256).for_mindie(256)
    for name in ("gate_proj", "up_proj", "down_proj"):
        draft.per_token(f"{shared}.{name}", 256, 256)
    reader = open_mindie(draft.write(tmp_path), 1)
    assert not reader.mix_shared_routing("model.layers.3.mlp")
    reader.linear(f"{shared}.down_proj", row_parallel=True)
    with pytest.raises(FxquantError, match="shared_experts.down_proj: W8A8_DYNAMIC; with mix_shared_routing"):
        reader.expert_linear(f"{EXPERTS}.2.down_proj", row_parallel=True)


def test_mindie_loads_gate_biases_and_norm_biases(tmp_path: Path) -> None:
    draft = Draft().for_mindie(256)
    draft.put("mlp.gate", "FLOAT", e_score_correction_bias=torch.tensor([3.0, 1.0, 2.0]))
    draft.put("norm", "FLOAT", weight=torch.ones(3), bias=torch.full((3,), 2.0))
    draft.put("plain_norm", "FLOAT", weight=torch.ones(3))
    reader = open_mindie(draft.write(tmp_path), 1)
    assert reader.gate_bias("mlp.gate.e_score_correction_bias").tolist() == [2.0, 0.0, 1.0]
    assert torch.equal(reader.norm("norm")[1], torch.full((3,), 2.0))
    assert torch.equal(reader.norm("plain_norm")[1], torch.zeros(3))


def test_mindie_reads_a_section_under_one_type(tmp_path: Path) -> None:
    """Static tensors under w8a8_dynamic are read per token, dynamic ones under w8a8 not at all, nor an unknown type."""
    draft, mlp = Draft(), "model.layers.0.mlp.down_proj"
    for module in (LINEAR, f"{ATTENTION}.kv_a_proj_with_mqa"):
        draft.static(module, 16, 64)
    draft.static(mlp, 64, 256)
    reader = open_mindie(draft.for_mindie(0, mla_quantize="w8a8").write(tmp_path / "static"), 1)
    x = torch.randn(3, 256)
    static, read_per_token = reader.linear(LINEAR), reader.linear(mlp, row_parallel=True)
    assert static.quantize(x, Arithmetic.EXACT)[1].shape == (1,)
    x8, x_scale = read_per_token.quantize(x, Arithmetic.EXACT)
    ideal = draft.truths[mlp].result(x8, x_scale)
    assert x_scale.shape == (3, 1)
    assert ((read_per_token(x, Arithmetic.EXACT).double() - ideal).abs() <= read_per_token.bound(x)).all()
    draft.types |= {name: "W8A8_DYNAMIC" for name in draft.types if name.startswith(LINEAR)}
    with pytest.raises(FxquantError, match="W8A8_DYNAMIC, but mla_quantize of config.json is w8a8"):
        open_mindie(draft.write(tmp_path / "dynamic"), 1).linear(LINEAR)
    with pytest.raises(FxquantError, match="mla_quantize 'w8a8_mix' of config.json; MindIE knows"):
        open_mindie(draft.for_mindie(0, mla_quantize="w8a8_mix").write(tmp_path / "mix"), 1).linear(LINEAR)
