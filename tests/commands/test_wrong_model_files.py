"""Ten model.py files that are wrong, each in one screen: the place, the fact and the way out."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.tools.main import run

OWN = """
import torch
from torch import nn
from fxquant.models import DecoderLayer, DeepseekV3, MoE
"""
WITH_MLP = (
    OWN
    + """
class Odd(nn.Module):
    def __init__(self, own):
        super().__init__()
        {init}
    def forward(self, x):
        {forward}
class Layer(DecoderLayer):
    def __init__(self, config, index):
        super().__init__(config, index)
        self.mlp = Odd(self.mlp)
def build_model(config):
    return DeepseekV3(config, layer=Layer)
"""
)
PLAIN = OWN + "def build_model(config):\n    return DeepseekV3(config)\n"

LESS = (
    OWN
    + """
class Layer(DecoderLayer):
    def forward(self, x, cos, sin, attention_mask, past):
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, attention_mask, past)
        x = x + attended
        return x + self.mlp(x), present
def build_model(config):
    return DeepseekV3(config, layer=Layer)
"""
)

WRONG: dict[str, tuple[str, tuple[str, ...]]] = {
    "import error": (
        "import nothing_of_this_name\n",
        (
            "model.py",
            "No module named 'nothing_of_this_name'",
            "line 1: import nothing_of_this_name",
            "build_model(config)",
        ),
    ),
    "no build_model": (
        "def make_model(config): ...\n",
        ("model.py", "defines no build_model", "docs/model-file.md"),
    ),
    "CUDA at import": (
        "import torch\nscale = torch.ones(1).cuda()\n",
        ("model.py", "line 2: scale = torch.ones(1).cuda()", "meta device", "must not choose a device"),
    ),
    "loop over values": (
        WITH_MLP.format(
            init="self.experts, self.gate = nn.ModuleList([own]), nn.Linear(256, 8)",
            forward="return sum(self.experts[0](x) for _ in self.gate(x).argmax(-1).flatten().tolist())",
        ),
        ("model.layers.0.mlp", "Odd", "LEAVES = {Odd: adapters.MoE(", 'experts="experts"', "gate"),
    ),
    "cache written in place": (
        WITH_MLP.format(
            init="self.own = own; self.register_buffer('cache', torch.zeros(8, 256))",
            forward="self.cache[:1] = x[:1, 0]; return self.own(x)",
        ),
        ("model.layers.0.mlp", "Odd", "cache", "in place", "LEAVES = {Odd: "),
    ),
    "wrong dtype": (
        WITH_MLP.format(
            init="self.own = own; self.codes = nn.Parameter(torch.zeros(256, dtype=torch.int8), requires_grad=False)",
            forward="return self.own(x) * self.codes",
        ),
        ("model.layers.0.mlp.codes", "Odd", "torch.int8", "Build the float model"),
    ),
    "missing tensor": (
        WITH_MLP.format(
            init="self.own = own; self.scale = nn.Parameter(torch.empty(next(own.parameters()).shape[-1]))",
            forward="return self.own(x) * self.scale",
        ),
        ("tensor model.layers.0.mlp.", "is missing", "model's parameter names"),
    ),
    "a size of its own": (
        WITH_MLP.format(
            init="self.own = own; self.scale = nn.Parameter(torch.empty(256))",
            forward="return self.own(x) * self.scale",
        ),
        ("model.py", "a copy of it with hidden_size 64", "layers.0.mlp: Odd", "Take every size from the config"),
    ),
    "a norm left out": (
        LESS,
        (
            "layer model.layers.0",
            "published graph has fxq::rms_norm.default in",
            "so the change would be lost",
            "--graph-only",
        ),
    ),
    "extra tensor": (
        "# --graph-only\n" + LESS,
        ("model.layers.0.post_attention_layernorm.weight belongs to no parameter", "add it to the model's forward"),
    ),
    "not a DeepSeek": (
        "import transformers\ndef build_model(config):\n"
        "    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))\n",
        ("model.py", "LlamaForCausalLM", "Return a DeepSeek-V3", "DeepseekV3ForCausalLM"),
    ),
    "runs forever": (
        "while True:\n    pass\n",
        ("model.py", "not imported, built and traced within 4 seconds", "--trace-timeout"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("text", "words"), WRONG.values(), ids=WRONG.keys())
def test_one_screen(
    text: str, words: tuple[str, ...], tmp_path: Path, tiny_folder: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, out = tmp_path / "model.py", tmp_path / "out"
    path.write_text(text)
    limit = ["--trace-timeout", "4"] if "while True" in text else ["--graph-only"] if "--graph-only" in text else []
    arguments = ["compile", path, "--checkpoint", tiny_folder(), "-p", "deepseek_w4a8_dynamic", "-o", out, "-q", *limit]
    monkeypatch.setattr(sys, "argv", ["fxquant", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "110")
    with pytest.raises(SystemExit) as stop:
        run()
    screen = capsys.readouterr().err
    assert stop.value.code == 1
    plain = "".join(screen.replace("│", " ").split())  # a long path breaks at any letter
    missing = [word for word in words if "".join(word.split()) not in plain]
    assert not missing, f"{missing} not in:\n{screen}"
    assert len(screen.splitlines()) <= 24 and "Traceback" not in screen
    assert sorted(tmp_path.iterdir()) == [path]
