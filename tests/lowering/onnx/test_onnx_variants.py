"""The ONNX target: graphs with operators of their own, and errors."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_calls import floats
from onnx_graphs import check_everything, emit, quantized
from rewrites import insert_after
from tiny import random_tensors, stored_tensors, tiny_config, write_checkpoint, write_shards
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint, open_checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.onnx import write_onnx
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.models import DecoderLayer

ATEN = torch.ops.aten


class Research(DecoderLayer):
    """A layer with a parameter of its own and plain torch operators around the attention."""

    def __init__(self, config: Any, index: int) -> None:
        super().__init__(config, index)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(torch.tanh(x / 8) * 8, *rest)
        gate = torch.sigmoid(x.mean(-1, keepdim=True)).expand(-1, -1, x.shape[-1])
        heads = y.view(y.shape[0], y.shape[1], 4, -1).clamp(-4, 4).flatten(-2)
        return x + heads * gate * self.scale, present


def test_a_subclass_with_its_own_operators(tmp_path: Path):
    folder = write_checkpoint(tmp_path / "checkpoint")
    tensors = stored_tensors(random_tensors(tiny_config(torch_dtype="bfloat16"), 0), torch.bfloat16, fp8=False)
    own = {f"model.layers.{index}.scale": floats(256, seed=index).bfloat16() for index in range(2)}
    write_shards(folder, tensors | own)
    checkpoint = open_checkpoint(folder)
    policy = tmp_path / "research.yaml"
    policy.write_text("extends: deepseek_w4a8\nrules:\n  - {kind: other, scheme: FLOAT}\n")
    program = quantized(checkpoint, str(policy), Research)
    check_everything(emit(program, checkpoint, tmp_path))


class Unsupported(DecoderLayer):
    def forward(self, x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x.roll(1, -1), *rest)


def test_an_operator_without_onnx_form_is_named(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8_dynamic", Unsupported)
    fact = r"layers_0_roll \(model.layers.0\): aten.roll.default has no ONNX form. Write it with the operators of"
    with pytest.raises(FxquantError, match=fact):
        emit(program, tiny(), tmp_path)
    assert not (tmp_path / "model.onnx").exists()


def test_an_operator_between_the_experts_is_part_of_them(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_1_mlp_experts_swiglu", ATEN.clamp.default, -0.2, 0.2)
    insert_after(program, "layers_1_mlp_experts_rows", ATEN.mul.Tensor, 1.5)
    insert_after(program, "layers_1_mlp_experts_up_proj_int32", ATEN.clamp.default, -9000, 9000)
    insert_after(program, "layers_1_mlp_experts_rows_int8", ATEN.clamp.default, -100, 100)
    emitted = emit(program, tiny(), tmp_path)
    check_everything(emitted)
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    function = next(candidate for candidate in model.functions if candidate.name == "routed_expert")
    assert [node.op_type for node in function.node].count("Clip") == 3


def test_rows_of_several_experts_may_not_mix(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_1_mlp_experts_swiglu", ATEN.softmax.int, 0)
    with pytest.raises(FxquantError, match="softmax.int mixes the rows of several experts"):
        emit(program, tiny(), tmp_path)


def test_int8_values_under_other_operators(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8")
    insert_after(program, "layers_0_mlp_swiglu_int8", ATEN.clamp.default, -50, 60)
    insert_after(program, "layers_0_post_attention_layernorm_int8", ATEN.slice.Tensor, -1, 0, 256)
    check_everything(emit(program, tiny(), tmp_path))


def test_missing_weights_are_named(tiny: Callable[..., Checkpoint], tmp_path: Path):
    program = quantized(tiny(), "deepseek_w4a8_dynamic")
    with pytest.raises(FxquantError, match=r"model\.embed_tokens\.weight: is read by the graph but not in the weight"):
        write_onnx(program, {}, tmp_path)


def test_a_folder_without_model_is_named(tmp_path: Path):
    with pytest.raises(FxquantError, match=r"model\.onnx: no such file\. Compile with --target onnx"):
        OnnxRunner(tmp_path)
