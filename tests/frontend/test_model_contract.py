"""What a model.py may define beside build_model: LEAVES, checkpoint_names, example_inputs, dynamic_shapes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.errors import FxquantError
from fxquant.frontend.build import trace_file
from fxquant.frontend.source import open_source
from fxquant.program.program_file import dump_program, parse_program
from fxquant.program.structural_hash import structural_hash

OWN = """
import torch
from torch import nn
from fxquant import adapters, ops
from fxquant.models import MLA, MLP, DecoderLayer, DeepseekV3, MoE, RMSNorm

class Layer(DecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.change(config)

def build_model(config):
    return DeepseekV3(config, layer=Layer)
"""

LEAVES = {
    "attention": """
class Latent(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.down, self.up, self.norm = own.q_a_proj, own.q_b_proj, own.q_a_layernorm
        self.latent, self.latent_norm, self.expand, self.out = (
            own.kv_a_proj_with_mqa, own.kv_a_layernorm, own.kv_b_proj, own.o_proj)
        self.whole = [own]  # a list hides it from torch
    def forward(self, x, cos, sin, attention_mask, past):
        assert x.isfinite().all() or x.is_meta
        out, present = self.whole[0](x, cos, sin, attention_mask, past)
        return (out, present) if float(x.sum()) == float(x.sum()) else (x, past)
Layer.change = lambda self, config: setattr(self, "self_attn", Latent(self.self_attn))
LEAVES = {Latent: adapters.Attention(
    q_a_proj="down", q_a_layernorm="norm", q_b_proj="up", kv_a_proj_with_mqa="latent",
    kv_a_layernorm="latent_norm", kv_b_proj="expand", o_proj="out")}
""",
    "mlp": """
class Gated(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.a, self.b, self.c = own.gate_proj, own.up_proj, own.down_proj
    def forward(self, x):
        if float(x.abs().max()) > 1e30:
            return x
        return self.c(nn.functional.silu(self.a(x)) * self.b(x))
def change(self, config):
    if isinstance(self.mlp, MLP):
        self.mlp = Gated(self.mlp)
Layer.change = change
LEAVES = {Gated: adapters.MLP(gate_proj="a", up_proj="b", down_proj="c")}
""",
    "norm": """
class Norm(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.gain, self.floor = own.weight, own.eps
    def forward(self, x):
        assert float(x.sum()) < 1e30
        return x * (x.pow(2).mean(-1, keepdim=True) + self.floor).rsqrt() * self.gain
Layer.change = lambda self, config: setattr(self, "input_layernorm", Norm(self.input_layernorm))
LEAVES = {Norm: adapters.RMSNorm(weight="gain", eps="floor")}
""",
    "a function": """
class Checked(nn.Module):
    def __init__(self, own):
        super().__init__()
        self.own = own
    def forward(self, x):
        assert float(x.sum()) < 1e30
        return self.own(x)
Layer.change = lambda self, config: setattr(self, "mlp", Checked(self.mlp))
LEAVES = {Checked: lambda module, adaptation: adaptation.convert(module.own)}
""",
}


def write(folder: Path, text: str) -> Path:
    (folder / "model.py").write_text(text)
    return folder / "model.py"


@pytest.mark.parametrize("text", LEAVES.values(), ids=LEAVES.keys())
def test_declared_classes_become_parts_of_the_one_graph(
    text: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """Each reads a value in its forward, and the small copy runs that forward."""
    traced = trace_file(write(tmp_path, OWN + text), tiny_folder())
    assert traced.program == dump_program(open_source(tiny_folder()).program())


def test_without_its_declaration_the_error_shows_one_to_paste(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = OWN + LEAVES["mlp"].split("LEAVES")[0]
    with pytest.raises(FxquantError) as caught:
        trace_file(write(tmp_path, text), tiny_folder())
    assert caught.value.place == "model.layers.0.mlp"
    assert "Gated cannot be traced" in caught.value.fact
    assert "LEAVES = {Gated: lambda own, adaptation: TracedGated(own)}" in caught.value.remedy


def test_the_adapter_it_shows_is_python(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = OWN + LEAVES["mlp"].split("LEAVES")[0]
    with pytest.raises(FxquantError) as caught:
        trace_file(write(tmp_path, text), tiny_folder())
    pasted = caught.value.remedy.split("\n\n", 1)[1]
    compile("\n".join(line.removeprefix("    ") for line in pasted.split("\n")), "pasted", "exec")


def test_an_adapter_that_names_what_is_not_there(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = OWN + LEAVES["mlp"].replace('gate_proj="a"', 'gate_proj="first"')
    with pytest.raises(FxquantError, match="Gated: an adapter looks for 'first', .* It has: a, b, c"):
        trace_file(write(tmp_path, text), tiny_folder())


def test_a_forward_that_fails_on_the_small_copy(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = OWN + LEAVES["mlp"].replace("> 1e30", "> 0 and x.missing")
    with pytest.raises(FxquantError, match=r"forward of DeepseekV3 fails on a small copy: AttributeError.*\(line \d+"):
        trace_file(write(tmp_path, text), tiny_folder())


RENAMED = """
Layer.change = lambda self, config: None
def checkpoint_names(path):
    return path.replace("model.layers.", "transformer.blocks.").replace("self_attn", "attention")
"""


def test_checkpoint_names(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """The graph has the checkpoint's names; a model with other paths compiles against it."""
    program = parse_program(trace_file(write(tmp_path, OWN + RENAMED), tiny_folder()).program, "here")
    plain = open_source(tiny_folder()).program()

    def renamed(name: str) -> str:
        return name.replace("model.layers.", "transformer.blocks.").replace("self_attn", "attention")

    assert [*program.parameters] == [renamed(name) for name in plain.parameters]
    for parameter, other in zip(program.parameters.values(), plain.parameters.values(), strict=True):
        assert parameter.names == tuple(map(renamed, other.names))
        assert (parameter.module, parameter.kind, parameter.stacked) == (
            renamed(other.module),
            other.kind,
            other.stacked,
        )
    calls = {node.name: node.meta["module"] for node in program.graph.graph.nodes if node.op == "call_function"}
    assert calls["transformer_blocks_0_attention_q_a_proj"] == "transformer.blocks.0.attention.q_a_proj"


EXAMPLES = """
Layer.change = lambda self, config: None
def example_inputs(model, phase):
    batch, sequence, past = {"decode": (3, 4, 6), "prefill": (2, 9, 0)}[phase]
    ids = torch.zeros(batch, sequence, dtype=torch.int64)
    mask = torch.zeros(batch, past + sequence, dtype=torch.int64)
    width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
    cache = [torch.zeros(batch, past, width) for _ in range(model.config.num_hidden_layers)]
    return (ids, mask), {"position_ids": ids, "past": cache}
"""


def test_example_inputs_of_the_file_give_the_same_graph(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    program = trace_file(write(tmp_path, OWN + EXAMPLES), tiny_folder()).program
    expected = structural_hash(open_source(tiny_folder()).program())
    assert structural_hash(parse_program(program, "here")) == expected


def test_dynamic_shapes_of_the_file_are_used(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = EXAMPLES + "def dynamic_shapes(phase):\n    return ({}, {}, {}, [{}, {}])\n"
    with pytest.raises(FxquantError, match="dynamic_shapes: leaves the rows of input_ids fixed at 3"):
        trace_file(write(tmp_path, OWN + text), tiny_folder())


def test_example_inputs_that_do_not_fit_the_forward(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = OWN + "Layer.change = lambda self, config: None\ndef example_inputs(model, phase): return (1,), {'x': 2}\n"
    with pytest.raises(FxquantError, match=r"example_inputs\(model, 'decode'\): returned no valid \(args, kwargs\)"):
        trace_file(write(tmp_path, text), tiny_folder())


def test_a_module_on_the_dialect_that_is_no_deepseek_v3(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    text = """
from torch import nn
from fxquant.models import DeepseekV3
class Mine(nn.Module):
    def __init__(self, config):
        super().__init__()
        inner = DeepseekV3(config)
        self.config, self.model, self.lm_head = config, inner.model, inner.lm_head
    def forward(self, input_ids, attention_mask, position_ids, past):
        x, presents = self.model(input_ids, attention_mask, position_ids, past)
        return self.lm_head(x), presents
def build_model(config):
    return Mine(config)
"""
    program = trace_file(write(tmp_path, text), tiny_folder()).program
    assert program == dump_program(open_source(tiny_folder()).program())


def test_renamed_checkpoint_compiles(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """A checkpoint under other names, and the model file that knows them."""
    folder = tmp_path / "renamed"
    folder.mkdir()
    (folder / "config.json").write_text((tiny_folder() / "config.json").read_text())
    tensors = load_file(tiny_folder() / "model.safetensors")
    save_file({name.replace("self_attn", "attention"): tensor for name, tensor in tensors.items()},
              folder / "model.safetensors")  # fmt: skip
    text = OWN + "Layer.change = lambda self, config: None\n"
    text += "def checkpoint_names(path): return path.replace('self_attn', 'attention')\n"
    program = parse_program(trace_file(write(tmp_path, text), folder).program, "here")
    assert {name for parameter in program.parameters.values() for name in parameter.names} == set(
        open_checkpoint(folder).tensors
    )
