"""modeling_deepseek.py of checkpoint folders, without a line of the user's."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from places import MODEL_FILES

from fxquant.errors import FxquantError
from fxquant.frontend.build import trace_file
from fxquant.frontend.source import open_source
from fxquant.program.program_file import parse_program
from fxquant.program.structural_hash import structural_hash

pytest.importorskip("transformers", reason="its cache is what the model is run with")

STYLE = MODEL_FILES / "remote_style.py"
EDITS = {
    "residual": ("residual + hidden_states", "residual + 0.5 * hidden_states"),
    "a dense MLP by another activation": (
        "        self.input_layernorm",
        "        if dense:\n            self.mlp.act_fn = nn.GELU()\n        self.input_layernorm",
    ),
    "gate": ("(weights.sum(-1, keepdim=True) + 1e-20)", "(weights.amax(-1, keepdim=True) + 1e-20)"),
    "root": ("self.lm_head(hidden_states).float()", "self.lm_head(hidden_states).float().tanh()"),
}
REFUSED = {
    "attention": ("* self.softmax_scale +", "* self.softmax_scale * 2 +", "caches keys and values of all heads"),
    "experts by another activation": ("nn.SiLU()", "nn.GELU()", r"its act_fn is GELU\("),
    "experts": ("self.act_fn(self.gate_proj(x))", "self.act_fn(self.gate_proj(x) + 1)", r"DeepseekV3MLP is not .*\+ "),
    "rotary table": ("1.0 / self.base", "1.0 / (2 * self.base)", "rotary table differs"),
}


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Callable[..., Path]) -> Path:
    """A checkpoint with its model file in it."""
    return Path(shutil.copytree(tiny_folder(), tmp_path / "model"))


def traced_hash(file: Path) -> str:
    return structural_hash(parse_program(trace_file(file).program, file))


def test_the_file_of_a_checkpoint_folder_gives_the_graph_of_the_folder(folder: Path) -> None:
    """Its config class is imported from beside it, and the folder is its checkpoint."""
    text = STYLE.read_text()
    start, end = text.index("class DeepseekV3Config"), text.index("class DeepseekV3RMSNorm")
    (folder / "configuration_deepseek.py").write_text(text[start:end])
    imported = "from .configuration_deepseek import DeepseekV3Config\n\n\n"
    (folder / "modeling_deepseek.py").write_text(text[:start] + imported + text[end:])
    assert traced_hash(folder / "modeling_deepseek.py") == structural_hash(open_source(folder).program())


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there"), EDITS.values(), ids=EDITS.keys())
def test_an_edit_is_compiled_as_edited(here: str, there: str, folder: Path) -> None:
    text = STYLE.read_text()
    assert here in text
    (folder / "modeling_deepseek.py").write_text(text.replace(here, there))
    assert traced_hash(folder / "modeling_deepseek.py") != structural_hash(open_source(folder).program())


@pytest.mark.parametrize(("here", "there", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_edit_that_no_graph_can_have_is_refused(here: str, there: str, message: str, folder: Path) -> None:
    text = STYLE.read_text()
    assert here in text
    (folder / "modeling_deepseek.py").write_text(text.replace(here, there))
    with pytest.raises(FxquantError, match=f"(?s){message}"):
        trace_file(folder / "modeling_deepseek.py")


def test_the_rotary_table_of_a_late_layer_is_compared(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    """It is no part of the attention's code, and moves no value of a few tokens by more than rounding may."""
    folder = Path(shutil.copytree(tiny_folder(num_hidden_layers=4), tmp_path / "model"))
    given, changed = "config.rope_theta, yarn)", "config.rope_theta * (1.0001 if layer_idx == 3 else 1), yarn)"
    assert given in STYLE.read_text()
    (folder / "modeling_deepseek.py").write_text(STYLE.read_text().replace(given, changed))
    with pytest.raises(FxquantError, match="rotary table differs"):
        trace_file(folder / "modeling_deepseek.py")
