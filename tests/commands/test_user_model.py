"""A user's model.py that changes a block changes every output, and all of them still agree with its forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import load_weights

import fxquant
from fxquant import CompileOptions
from fxquant.api import open_graph, open_output
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.engines.table import Target
from fxquant.frontend.build import build_model
from fxquant.frontend.source import open_source
from fxquant.frontend.user_file import open_user_file
from fxquant.models import DeepseekV3
from fxquant.program.text import format_program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.tracing import trace

PLAIN = """
from fxquant.models import DeepseekV3
CHECKPOINT = {checkpoint!r}
def build_model(config):
    return DeepseekV3(config)
"""
VARIANTS = {
    "residual factor": """
from fxquant.models import DecoderLayer, DeepseekV3
CHECKPOINT = {checkpoint!r}
class Scaled(DecoderLayer):
    def forward(self, x, cos, sin, attention_mask, past):
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, past)
        x = x + 0.5 * attended
        return x + self.mlp(self.post_attention_layernorm(x)), present
def build_model(config):
    return DeepseekV3(config, layer=Scaled)
""",
    "extra norm": """
from fxquant.models import DecoderLayer, DeepseekV3
CHECKPOINT = {checkpoint!r}
class Sandwich(DecoderLayer):
    def forward(self, x, cos, sin, attention_mask, past):
        y, present = super().forward(x, cos, sin, attention_mask, past)
        return self.post_attention_layernorm(y), present
def build_model(config):
    return DeepseekV3(config, layer=Sandwich)
""",
}


def write_model(folder: Path, name: str, text: str, checkpoint: Path) -> Path:
    path = folder / f"{name.replace(' ', '_')}.py"
    path.write_text(text.format(checkpoint=str(checkpoint)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_changed_block_changes_every_output(variant: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    checkpoint = tiny_folder()
    plain = write_model(tmp_path, "plain", PLAIN, checkpoint)
    changed = write_model(tmp_path, variant, VARIANTS[variant], checkpoint)
    assert list(format_program(open_graph(plain))) != list(format_program(open_graph(changed)))
    for target, file in ((Target.ASCEND, "model_ascend.py"), (Target.ONNX, "model.onnx")):
        outs = []
        for model in (plain, changed):
            options = CompileOptions(policy="deepseek_w4a8_dynamic", target=target, out=tmp_path / target / model.stem)
            report = fxquant.compile(model, options)
            assert report.verification is not None
            assert report.verification.verdict == "verified"  # emitted graph against fx, operator by operator
            outs.append((report.out / file).read_bytes())
        assert outs[0] != outs[1]


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_its_float_graph_is_its_eager_forward(variant: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    checkpoint = open_checkpoint(tiny_folder())
    with open_user_file(write_model(tmp_path, variant, VARIANTS[variant], checkpoint.folder)) as file:
        model = build_model(file, parse_config(checkpoint.config, file.path), "meta")
    assert isinstance(model, DeepseekV3)
    program = trace(model, checkpoint)
    ids = torch.arange(14).view(2, 7)
    inputs = prefill_inputs(program, ids)
    with torch.no_grad():
        eager, _ = load_weights(model, checkpoint)(*inputs[:3], inputs[3:])
    traced = execute(program, checkpoint.read, [inputs])[0][0]
    assert torch.equal(traced, eager)  # the same operators on the same values


@pytest.mark.slow
def test_float_policy_reproduces_the_float_graph(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    model = write_model(tmp_path, "extra norm", VARIANTS["extra norm"], tiny_folder())
    out = fxquant.compile(model, CompileOptions(policy="float", out=tmp_path / "out")).out
    program, read = open_output(out)
    source = open_source(model)
    inputs = prefill_inputs(program, torch.arange(14).view(2, 7))
    float_graph = execute(source.program(), source.checkpoint.read, [inputs])[0]
    assert torch.equal(execute(program, read, [inputs])[0][0], float_graph[0])
