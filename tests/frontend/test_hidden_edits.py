"""Edits that leave a class's source, its name or a small copy as they were: compiled as edited, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from places import MODEL_FILES

from fxquant.errors import FxquantError
from fxquant.frontend.build import trace_file
from fxquant.frontend.child_main import _unexpected
from fxquant.frontend.source import open_source
from fxquant.program.program_file import parse_program
from fxquant.program.structural_hash import structural_hash

ROOT = "class Transformer(nn.Module)"
WRAPPED = """\
import functools

def clamped(forward):
    @functools.wraps(forward)
    def wrapper(self, *given):
        return forward(self, *given).clamp(-300, 300)
    return wrapper

{cls}.forward = clamped({cls}.forward)


"""
CLAMPED = """\
class Clamped({base}):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)

def with_clamp(made, *given):
    plain(made, *given)
    made.{name}.__class__ = Clamped

plain, {cls}.__init__ = {cls}.__init__, with_clamp


"""
SHARED = "        self.shared_experts = MLP("
HOOK = "register_forward_hook(lambda module, given, result: result * 0.5)"
MASK = "        if mask is not None:"
LATENT = "torch.zeros(rows, length, self.kv_lora_rank"
REFUSED = {
    "a wrapper around experts": (ROOT, WRAPPED.format(cls="Expert") + ROOT, r"Expert is not .*\+ return forward"),
    "a linear of another class in experts": (
        ROOT, CLAMPED.format(base="Linear", cls="Expert", name="w2") + ROOT, "its w2 is a Clamped, whose forward",
    ),
    "a hook on a late expert": (SHARED, f"        self.experts[5].w1.{HOOK}\n{SHARED}", "its w1 has a forward hook"),
    "a bias in experts": (
        SHARED, f"        self.experts[1].w3.bias = nn.Parameter(torch.ones(args.moe_inter_dim))\n{SHARED}",
        "its w3 has a bias",
    ),
    "an expert twice": (
        SHARED, f"        self.experts[2] = self.experts[1]\n{SHARED}", "expert 2 is the same module as expert 1",
    ),
    "an expert that is elsewhere": (SHARED, f"        self.experts[2] = None\n{SHARED}", "expert 2 is None: only"),
    "a layer twice": (
        "        self.norm = RMSNorm(args.dim)",
        "        self.layers[1] = self.layers[0]\n        self.norm = RMSNorm(args.dim)",
        "layer 1 is the same module as layer 0",
    ),
    "a cache of another dtype": (LATENT, f"{LATENT}, dtype=torch.float8_e4m3fn", "kv_cache is torch.float8_e4m3fn"),
    "far positions": (
        "return x + self.ffn(self.ffn_norm(x))",
        "return x + self.ffn(self.ffn_norm(x)) * (2.0 if start_pos > 3 * 1000 else 1.0)",
        "model.layers.0: Block computes with other numbers",
    ),
    "far positions, in decode alone": (
        MASK, f"        if length == 1 and end > 100:\n            scores = scores * 0.5\n{MASK}",
        r"model.layers.0.self_attn: MLA takes a different path for a single token",
    ),
    "positions between those of a table": (
        "torch.outer(torch.arange(args.max_seq_len)", "torch.outer(torch.arange(args.max_seq_len) % 100",
        "rotary table differs .* at position 100",
    ),
    "two experts without tokens": (
        "            if count:", "            if count and index not in (5, 6):",
        r"layer 1 \(Block\): on a copy of two layers and all experts",
    ),
    "a wide input alone": (
        "    if weight.element_size() > 1:",
        "    if x.size(-1) > 60:\n        x = x.clamp(-1, 1)\n    if weight.element_size() > 1:",
        "is a Linear, whose forward is not one product",
    ),
    "under autocast": (
        "        return x + self.ffn(self.ffn_norm(x))",
        "        with torch.autocast('cpu', torch.bfloat16):\n            return x + self.ffn(self.ffn_norm(x))",
        "region of its own, wrap_with_autocast",
    ),
}  # fmt: skip
COMPILED = {
    "a wrapper around the MLP": (ROOT, WRAPPED.format(cls="MLP") + ROOT),
    "a wrapper around attention": (ROOT, WRAPPED.format(cls="MLA") + ROOT),
    "wkv_b of another class": (ROOT, CLAMPED.format(base="ColumnParallelLinear", cls="MLA", name="wkv_b") + ROOT),
    "no norm of queries": ("self.q_norm = RMSNorm(self.q_lora_rank)", "self.q_norm = nn.Identity()"),
}


def written(folder: Path, here: str, there: str) -> Path:
    """The file in DeepSeek's style, edited."""
    text = (MODEL_FILES / "deepseek_style.py").read_text()
    assert text.count(here) == 1, here
    (folder / "model.py").write_text(text.replace(here, there))
    return folder / "model.py"


@pytest.mark.parametrize(("here", "there", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(here: str, there: str, message: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    with pytest.raises(FxquantError, match=f"(?s){message}"):
        trace_file(written(tmp_path, here, there), tiny_folder())


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there"), COMPILED.values(), ids=COMPILED.keys())
def test_compiled_as_edited(here: str, there: str, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """On the way copies are held against the file's own forward."""
    program = parse_program(trace_file(written(tmp_path, here, there), tiny_folder()).program, "here")
    assert structural_hash(program) != structural_hash(open_source(tiny_folder()).program())


def test_an_error_that_nobody_foresaw_is_not_blamed_on_the_file() -> None:
    with pytest.raises(KeyError) as caught:
        {}["f"]
    fact, remedy = _unexpected(caught.value)
    assert "KeyError: 'f' (test_hidden_edits.py:" in fact and "error of fxquant, not of the file" in remedy
