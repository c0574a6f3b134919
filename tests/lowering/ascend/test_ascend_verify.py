"""The Ascend module's weight loader, and that checking its statements notices what is wrong."""

import ast
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ascend_folders import (
    WEIGHTS,
    Compiled,
    bad,
    check_all,
    compile_folder,
    corrupted,
    graph_values,
    padded_inputs,
    rewritten,
)
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from torch import Tensor

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.errors import FxquantError
from fxquant.kernels.pack_int4 import pack_int4
from fxquant.lowering.ascend.emitted import weight_loading
from fxquant.lowering.ascend.emitter.emit import ascend_code
from fxquant.lowering.ascend.operators.grouped_matmul import unpack_int4
from fxquant.verification.ascend_statements import EmittedModule, check_statements

MOE = "model.layers.1"
EXPERTS = f"{MOE}.mlp.experts"


@pytest.fixture(scope="module")
def compiled(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Two-level int4 experts, static attention. Do not write to its folder."""
    return compile_folder(tiny_folder(), tmp_path_factory.mktemp("ascend"), "deepseek_w4a8")


# layouts


def test_int4_words_hold_eight_channels_each() -> None:
    codes = torch.randint(-8, 8, (16, 6), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    words = weight_loading.int4_words(torch.float32, pack_int4(codes))
    assert (words.dtype, tuple(words.shape)) == (torch.int32, (6, 2))
    assert torch.equal(unpack_int4(words), codes.T)
    rows_1_and_minus_2 = torch.full((4, 2), -31, dtype=torch.int8)  # 0xE1
    assert weight_loading.int4_words(torch.float32, rows_1_and_minus_2).tolist() == [[0xE1E1E1E1 - (1 << 32)]] * 2


def test_group_scales_are_rounded_to_float16() -> None:
    scale, second = torch.tensor([[0.0123], [1.0]]), torch.tensor([[1.0, 17.0], [2.0, 3.0]])
    words = weight_loading.group_scale(torch.float32, scale, second)
    assert (words.dtype, tuple(words.shape)) == (torch.int64, (2, 2))
    expected = [[0.0123, 1.0 * 2], [0.0123 * 17, 3.0]]
    bits = torch.tensor(expected).half().float().view(torch.int32)
    assert words.tolist() == bits.long().tolist()
    assert weight_loading.channel_scale_word(torch.float32, torch.tensor([[0.0123]])).item() == 1011451376


def test_scale_bias_is_summed_over_its_parts() -> None:
    parts = torch.arange(32.0).view(2, 16)
    assert weight_loading.summed(torch.float32, parts).tolist() == parts.sum(1).tolist()


def test_runtime_layout_of_a_layer(compiled: Compiled) -> None:
    weights = compiled.module().load(MOE)[MOE]
    shapes = {
        "self_attn.q_a_proj.weight": ((256, 64), torch.int8),
        "self_attn.q_a_proj.deq_scale": ((64,), torch.float32),
        "self_attn.q_a_proj.input_scale": ((256,), torch.float32),
        "self_attn.o_proj.input_scale": ((1,), torch.bfloat16),
        "mlp.experts.gate_proj.weight": ((8, 256, 32), torch.int32),
        "mlp.experts.gate_proj.scale": ((8, 1, 256), torch.int64),
        "mlp.experts.down_proj.scale_bias": ((8, 256), torch.float32),
    }
    assert {name: (tuple(weights[name].shape), weights[name].dtype) for name in shapes} == shapes
    stored = load_file(compiled.folder / WEIGHTS)
    assert torch.equal(weights["self_attn.q_a_proj.weight"].T, stored[f"{MOE}.self_attn.q_a_proj.weight"])


# files


def test_sharded_weights_are_found_by_their_index(compiled: Compiled, tmp_path: Path) -> None:
    tensors = load_file(compiled.folder / WEIGHTS)
    names = sorted(tensors)
    files = {f"quant_model_weight_w8a8-{part:05}-of-00003.safetensors": names[part - 1 :: 3] for part in (1, 2, 3)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (tmp_path / "quant_model_weight_w8a8.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model_ascend.py").write_text(compiled.code)
    whole, sharded = (EmittedModule(compiled.deployed, folder).load(MOE)[MOE] for folder in (compiled.folder, tmp_path))
    assert whole.keys() == sharded.keys()
    assert all(torch.equal(whole[name], sharded[name]) for name in whole)


def test_a_missing_tensor_is_named(compiled: Compiled, tmp_path: Path) -> None:
    name = f"{EXPERTS}.3.up_proj.scale_bias"
    broken = corrupted(compiled, tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(KeyError, match=f"its weight files have no tensor {name}"):
        dict(broken.module().load(MOE)[MOE])


def test_an_edited_module_is_refused_and_not_run(compiled: Compiled, tmp_path: Path) -> None:
    marker = tmp_path / "was run"
    lines = compiled.code.splitlines(keepends=True)
    edited = [*lines[:60], f"open({str(marker)!r}, 'w')\n", *lines[60:]]
    (tmp_path / "model_ascend.py").write_text("".join(edited))
    with pytest.raises(FxquantError, match="line 61 is not what the graph emits"):
        EmittedModule(compiled.deployed, tmp_path)
    assert not marker.exists()
    (tmp_path / "model_ascend.py").unlink()
    with pytest.raises(FxquantError, match="line 1 is not what the graph emits"):
        EmittedModule(compiled.deployed, tmp_path)


def test_int4_channels_come_in_eights(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, hidden_size=252))
    program = rewritten(checkpoint, "deepseek_w4a8_per_channel")
    fact = "layer model.layers.1.mlp.experts.down_proj: out_features 252 is not a multiple of 8: npu_grouped_matmul"
    with pytest.raises(FxquantError, match=fact):
        ascend_code(program)


# corruption: values come from the checkpoint, weights from the changed files


def busiest_expert(compiled: Compiled) -> int:
    values = graph_values(compiled, padded_inputs(compiled.program))
    return int(values["layers_1_mlp_experts_counts"].argmax())


def flip(tensor: Tensor, byte: int) -> None:
    """Invert one byte."""
    tensor.view(-1).view(torch.uint8)[byte] ^= 0xFF


def assert_found(compiled: Compiled, folder: Path, change: Callable[[dict[str, Tensor]], None], *nodes: str) -> None:
    misses = bad(check_all(corrupted(compiled, folder, change), MOE))
    assert sorted(misses) == sorted(f"layers_1_{node}" for node in nodes)


@pytest.mark.parametrize(
    ("tensor", "byte", "node"),
    [
        ("self_attn.q_a_proj.weight", 7, "self_attn_q_a_proj"),
        ("self_attn.q_a_proj.quant_bias", 1, "self_attn_q_a_proj"),
        ("self_attn.o_proj.deq_scale", 6, "self_attn_o_proj"),
        ("self_attn.o_proj.input_offset", 1, "self_attn_o_proj_input_int8"),
        ("self_attn.kv_b_proj.weight", 1, "self_attn_kv_b_proj"),
        ("input_layernorm.weight", 0, "self_attn_q_a_proj_input_int8"),
        ("post_attention_layernorm.weight", 1, "post_attention_layernorm"),
        ("mlp.gate.weight", 1, "mlp_gate_router_logits"),
    ],
)
def test_one_wrong_byte_is_found_at_its_statement(
    compiled: Compiled, tmp_path: Path, tensor: str, byte: int, node: str
) -> None:
    assert_found(compiled, tmp_path, lambda tensors: flip(tensors[f"{MOE}.{tensor}"], byte), node)


@pytest.mark.parametrize("suffix", ["weight", "weight_scale", "weight_scale_second", "scale_bias"])
def test_one_wrong_byte_of_an_expert_is_found(compiled: Compiled, tmp_path: Path, suffix: str) -> None:
    name = f"{EXPERTS}.{busiest_expert(compiled)}.gate_proj.{suffix}"
    assert_found(compiled, tmp_path, lambda tensors: flip(tensors[name], 2), "mlp_experts_gate_proj")


def test_swapped_nibbles_are_found(compiled: Compiled, tmp_path: Path) -> None:
    def swap(tensors: dict[str, Tensor]) -> None:
        for expert in range(8):
            weight = tensors[f"{EXPERTS}.{expert}.down_proj.weight"].view(torch.uint8)
            weight.copy_((weight << 4) | (weight >> 4))

    assert_found(compiled, tmp_path, swap, "mlp_experts_down_proj")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_scale_bias_is_found(compiled: Compiled, tmp_path: Path, projection: str) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for expert in range(8):
            tensors[f"{EXPERTS}.{expert}.{projection}.scale_bias"].zero_()

    assert_found(compiled, tmp_path, drop, f"mlp_experts_{projection}")


def test_rounded_scales_stay_within_a_bound_that_is_not_far(compiled: Compiled) -> None:
    """The bound of an int4 product is a worst case: random errors reach a good part of it, and some of it is left."""
    checks = [check for check in check_all(compiled, MOE) if check.kind == "grouped_dequantize"]
    assert len(checks) == 3
    assert all(check.bound / 20 < check.error < check.bound for check in checks)


def test_a_wrong_statement_is_found(compiled: Compiled) -> None:
    """Not the file but the emitter at fault: the module's text says another epsilon than the graph."""
    module = compiled.module()
    values = graph_values(compiled, padded_inputs(compiled.program))
    statements = module.statements["moe_block"]
    right = ast.unparse(statements[0])
    statements[:1] = ast.parse(right.replace("epsilon=1e-06", "epsilon=0.5")).body
    assert ast.unparse(statements[0]) != right
    checks = check_statements(module, MOE, module.load(MOE), values)
    assert bad(checks) == {"layers_1_self_attn_q_a_proj_input_int8": "add_rms_norm_quantize_static"}


def test_a_code_may_differ_only_at_a_tie(compiled: Compiled) -> None:
    """The integers of a fused swiglu have room where their floats are uncertain, which is next to nowhere."""
    module = compiled.module()
    values = graph_values(compiled, padded_inputs(compiled.program))
    name = "layers_1_mlp_experts_swiglu_int8"
    values[name] = values[name].clone()
    values[name][0, 0] += 1 if values[name][0, 0] < 100 else -1
    checks = check_statements(module, MOE, module.load(MOE), values)
    assert bad(checks)[name] == "swiglu_quantize_per_token"
