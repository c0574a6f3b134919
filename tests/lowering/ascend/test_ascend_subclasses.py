"""Decoder layers of a user in the emitted Ascend module: what they add is in the text and in the numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ascend_folders import (
    Compile,
    Compiled,
    bad,
    check_all,
    compile_folder,
    compiled_folders,
    function_text,
    padded_inputs,
)
from own_layers import ExtraNorm, ScaledResidual
from safetensors.torch import load_file, save_file
from tiny import write_checkpoint
from torch import Tensor, nn

from fxquant import ops
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DecoderLayer, RMSNorm
from fxquant.runtime.execute import execute


@pytest.fixture(scope="module")
def compiled(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiled_folders(tiny_folder, tmp_path_factory)


class OwnOperators(DecoderLayer):
    """A norm in float32 by hand, and calls of aten with and without a spelling of their own."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        y, present = super().forward(x, cos, sin, mask, past)
        wide = y.float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)
        first, second = y.chunk(2, -1)
        y = torch.cat((second, first), -1) + nn.functional.silu(y[..., 1:2]) * mask[:, -1:, None]
        return y.masked_fill(y > 2, float("-inf")).clamp(min=-3).maximum(y) - y.roll(1, -1), present


class BiasedNorm(RMSNorm):
    """As checkpoints of anti-outlier tools have it."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps)
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps, self.bias)


class BiasedNorms(DecoderLayer):
    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        self.input_layernorm = BiasedNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = BiasedNorm(config.hidden_size, config.rms_norm_eps)


def with_norms(folder: Path, out: Path, policy: str, layer: type[DecoderLayer], *names: str) -> Compiled:
    """The tiny model compiled with further norm tensors in each layer."""
    write_checkpoint(folder)
    tensors = load_file(folder / "model.safetensors")
    added = {f"model.layers.{layer}.{name}": torch.rand(256).bfloat16() for layer in range(2) for name in names}
    save_file(tensors | added, folder / "model.safetensors")
    return compile_folder(folder, out, policy, layer)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_dynamic"])
def test_a_norm_with_a_bias(policy: str, tmp_path: Path) -> None:
    """The fused operators with quantization take it, the one without has it added behind."""
    names = ("input_layernorm.bias", "post_attention_layernorm.bias")
    output = with_norms(tmp_path / "checkpoint", tmp_path / "out", policy, BiasedNorms, *names)
    text = function_text(output.code, "moe_block")
    assert 'beta=w["input_layernorm.bias"], epsilon=1e-06, ' in " ".join(text.split())
    assert "post_attention_layernorm, post_attention_layernorm_sum = add_rms_norm_bias(" in text
    assert bad(check_all(output)) == {}
    same_bits(output)


@pytest.fixture(scope="module")
def extra_norm(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    folder, out = tmp_path_factory.mktemp("checkpoint"), tmp_path_factory.mktemp("out")
    return with_norms(folder, out, "deepseek_w4a8", ExtraNorm, "extra_norm.weight")


def test_an_extra_norm_is_one_more_statement(compiled: Compile, extra_norm: Compiled) -> None:
    text, plain = (function_text(c.code, "dense_block") for c in (extra_norm, compiled("deepseek_w4a8")))
    added = '    # extra_norm\n    extra_norm = torch.ops.npu.npu_rms_norm(x, w["extra_norm.weight"], 1e-05)[0]\n'
    assert added in text
    others = text.replace(added, "").replace("extra_norm, ", "x, ")
    assert others == plain
    assert bad(check_all(extra_norm)) == {}


def test_an_extra_norm_takes_the_sum_of_the_layer_before(extra_norm: Compiled) -> None:
    """It alone reads that sum; what the layer adds on is its output."""
    text = function_text(extra_norm.code, "moe_block")
    first = '    extra_norm, _, _ = torch.ops.npu.npu_add_rms_norm(residual, x, w["extra_norm.weight"], 1e-05)\n'
    assert first in text
    assert 'input_layernorm = torch.ops.npu.npu_rms_norm(extra_norm, w["input_layernorm.weight"], 1e-06)[0]\n' in text
    assert "torch.ops.npu.npu_add_rms_norm(\n        extra_norm, self_attn_o_proj, " in text


def test_a_residual_factor_is_in_the_text(compiled: Compile) -> None:
    """Its product is what the next layer adds."""
    output = compiled("deepseek_w4a8", ScaledResidual)
    text = function_text(output.code, "moe_block")
    added = "    sub = add_1 - input_layernorm_sum\n    mul = sub * 0.5\n"
    assert text.endswith(f"{added}    return input_layernorm_sum, mul, self_attn_cat_1\n")
    assert bad(check_all(output)) == {}


@pytest.mark.parametrize("layer", [DecoderLayer, ScaledResidual])
@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_dynamic", "float"])
def test_the_deployed_graph_computes_the_same_bits(compiled: Compile, policy: str, layer: type[DecoderLayer]) -> None:
    same_bits(compiled(policy, layer))


def test_the_deployed_graph_with_an_extra_norm_computes_the_same_bits(extra_norm: Compiled) -> None:
    same_bits(extra_norm)


def same_bits(output: Compiled) -> None:
    inputs = padded_inputs(output.program)
    plain, fused = (execute(program, output.read(), [inputs])[0] for program in (output.program, output.deployed))
    assert len(plain) == len(fused) == 3
    assert all(torch.equal(a, b) for a, b in zip(plain, fused, strict=True))


def test_aten_calls_of_a_user(compiled: Compile) -> None:
    output = compiled("deepseek_w4a8_dynamic", OwnOperators)
    lines = [line.strip() for line in function_text(output.code, "dense_block").splitlines()]
    spelled = [
        "to = add_1.to(torch.float32)",
        "add_2 = mean + 1e-06",
        "chunk_0, chunk_1 = torch.chunk(to_1, 2, -1)",
        "cat = torch.cat([chunk_1, chunk_0], -1)",
        "slice = to_1[:, :, 1:2]",
        "slice_2 = slice_1[:, -1:]",
        'masked_fill = torch.ops.aten.masked_fill.Scalar(add_3, gt, float("-inf"))',
    ]
    assert [line for line in spelled if line not in lines] == []
    # what a user's cast made float32 is rounded again where the next layer's norm needs it
    moe = function_text(output.code, "moe_block")
    assert "npu_rms_norm(x.to(dtype), " in moe
    assert bad(check_all(output)) == {}
    model = output.module().names["Model"].load(output.folder)
    inputs = padded_inputs(output.program, past=0)
    assert model(*inputs[:3], model.empty_past(2))[0].dtype is torch.bfloat16
