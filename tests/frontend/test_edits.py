"""Edits inside classes that are known when they are not edited: compiled as edited, or refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from places import MODEL_FILES

from fxquant.errors import FxquantError
from fxquant.frontend.build import trace_file
from fxquant.frontend.source import open_source
from fxquant.program.program_file import parse_program
from fxquant.program.structural_hash import structural_hash

DENSE = "silu(self.w1(x)) * self.w3(x))\n\n\nclass Gate"
EDITS = {
    "another activation in the MLP": (DENSE, DENSE.replace("silu", "gelu")),
    "groups by their best": ("topk(2, -1)[0].sum(-1)", "amax(-1)"),
    "chosen without bias": ("scores + self.bias", "scores + 0 * self.bias"),
    "weighed with bias": ("scores.gather", "(scores + self.bias).gather"),
    "another scale": ("* self.softmax_scale", "* self.softmax_scale**2"),
    "norm after": ("self.norm(h)[:, -1]", "self.norm(h + h.abs())[:, -1]"),
    "a window": (
        "        if mask is not None:",
        "        place = torch.arange(start_pos, end)[:, None, None] - torch.arange(end)\n"
        "        scores = scores.masked_fill(place >= 40, -torch.inf)\n        if mask is not None:",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_inside_a_known_class_is_compiled_as_edited(
    here: str, there: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    """The class keeps its name and runs its own forward; on the way copies are held against the file's."""
    text = (MODEL_FILES / "deepseek_style.py").read_text()
    assert here in text
    (tmp_path / "model.py").write_text(text.replace(here, there))
    program = parse_program(trace_file(tmp_path / "model.py", tiny_folder()).program, "here")
    assert structural_hash(program) != structural_hash(open_source(tiny_folder()).program())


SWIGLU = "silu(self.w1(x)) * self.w3(x))\n\n\nclass MoE"
LOST = {
    "no causal mask": ("if length > 1 else None", "if length > 100 else None", "hidden states|logits|different path"),
    "another activation in experts": (SWIGLU, SWIGLU.replace("silu", "gelu"), r"Expert is not .*\+ return self.w2"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there", "message"), LOST.values(), ids=LOST.keys())
def test_an_edit_that_no_graph_can_have_is_refused(
    here: str, there: str, message: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    text = (MODEL_FILES / "deepseek_style.py").read_text()
    assert here in text
    (tmp_path / "model.py").write_text(text.replace(here, there))
    with pytest.raises(FxquantError, match=f"(?s){message}"):
        trace_file(tmp_path / "model.py", tiny_folder())


OF_TRANSFORMERS = """
import transformers
from torch import nn


def build_model(config):
    {before}
    return model
"""
REFUSED = {
    "experts by another activation": (
        "model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**config.model_dump()))\n"
        "    model.model.layers[-1].mlp.experts.act_fn = nn.GELU()",
        r"experts run as one grouped operator.*its act_fn is GELU\(",
    ),
    "weights of its own": (
        'model = transformers.AutoModelForCausalLM.from_pretrained("nowhere/at-all", local_files_only=True)',
        "build_model failed: .*weights are read from the checkpoint",
    ),
}


@pytest.mark.parametrize(("before", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_a_model_of_transformers_may_not_do(
    before: str, message: str, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    pytest.importorskip("transformers", minversion="5.13")
    (tmp_path / "model.py").write_text(OF_TRANSFORMERS.format(before=before))
    with pytest.raises(FxquantError, match=f"(?s){message}"):
        trace_file(tmp_path / "model.py", tiny_folder())
