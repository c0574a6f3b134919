"""A user's model.py that changes a block changes every output, and all of them still agree with its forward."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import FEW_MODULES, load_weights
from traced_files import files_traced_once

import fxquant
from fxquant import CompileOptions
from fxquant.api import open_output
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.engines.table import Target
from fxquant.frontend.build import build_model
from fxquant.frontend.source import open_source
from fxquant.frontend.user_file import open_user_file
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH
from fxquant.models import DeepseekV3
from fxquant.program.program_file import load_program
from fxquant.program.text import format_program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.tracing import trace

__all__ = ["files_traced_once"]
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


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]
) -> Callable[[str, str, Target], Path]:
    """`compiled(name, text, target)`: the output of a model file, verified, once."""
    base, checkpoint = tmp_path_factory.mktemp("models"), tiny_folder(**FEW_MODULES)

    def get(name: str, text: str, target: Target) -> Path:
        out = base / target / name
        if not out.exists():
            model = write_model(base, name, text, checkpoint)
            options = CompileOptions(
                policy="deepseek_w4a8_dynamic", target=target, out=out, graph_only=name in VARIANTS
            )
            report = fxquant.compile(model, options)
            assert report.verification is not None
            assert report.verification.verdict == "verified"  # emitted graph against fx, operator by operator
        return out

    return get


@pytest.mark.slow
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_changed_block_changes_every_output(variant: str, compiled: Callable[[str, str, Target], Path]) -> None:
    for target, file in ((Target.ASCEND, "model_ascend.py"), (Target.ONNX, "model.onnx")):
        plain, changed = compiled("plain", PLAIN, target), compiled(variant, VARIANTS[variant], target)
        graphs = [list(format_program(load_program(out / FLOAT_GRAPH))) for out in (plain, changed)]
        assert graphs[0] != graphs[1]
        assert (plain / file).read_bytes() != (changed / file).read_bytes()


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
    out = fxquant.compile(
        model, CompileOptions(policy="float", out=tmp_path / "out", verify=False, graph_only=True)
    ).out
    program, read = open_output(out)
    source = open_source(model)
    inputs = prefill_inputs(program, torch.arange(14).view(2, 7))
    float_graph = execute(source.program(), source.checkpoint.read, [inputs])[0]
    assert torch.equal(execute(program, read, [inputs])[0][0], float_graph[0])
