"""MODEL as a user names it: folders, model.py files, and files that are wrong. Files are read in this process, except
where the process is what is tested."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.errors import FxquantError
from fxquant.frontend.build import build_model, checkpoint_folder, trace_file
from fxquant.frontend.source import open_source
from fxquant.frontend.user_file import open_user_file
from fxquant.models import DeepseekV3

PLAIN = """
from fxquant.models import DeepseekV3

CHECKPOINT = {folder!r}
POLICY = "deepseek_w4a8"


def build_model(config):
    return DeepseekV3(config)
"""
SMALL = """
import torch
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.models import DeepseekV3

config = DeepseekV3Config(
    vocab_size=64, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=2, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=2,
    first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
)
"""


@pytest.fixture
def folder(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder()


@pytest.fixture
def config(folder: Path, tiny: Callable) -> DeepseekV3Config:
    return parse_config(tiny().config, folder)


def model_file(path: Path, text: str) -> Path:
    (path / "model.py").write_text(text)
    return path / "model.py"


def built(path: Path, config: DeepseekV3Config) -> nn.Module:
    with open_user_file(path) as file:
        return build_model(file, config, "meta")


def on_meta(model: nn.Module) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def test_a_folder_is_the_model_of_its_config(folder: Path) -> None:
    source = open_source(folder)
    assert (source.checkpoint.folder, source.policy, source.name) == (folder, None, folder.name)
    assert source.program().parameters["model.norm.weight"].names == ("model.norm.weight",)


def test_a_file_is_traced_in_a_process_of_its_own(tmp_path: Path, folder: Path) -> None:
    source = open_source(model_file(tmp_path, PLAIN.format(folder=str(folder)) + "print('hello')\n"))
    assert (source.checkpoint.folder, source.policy, source.name) == (folder, "deepseek_w4a8", folder.name)
    assert source.program() is not source.program()
    assert "fxquant_user_model" not in sys.modules


def test_a_file_builds_the_model_on_meta(tmp_path: Path, folder: Path, config: DeepseekV3Config) -> None:
    model = built(model_file(tmp_path, PLAIN.format(folder=str(folder))), config)
    assert on_meta(model) and not model.training


def test_build_model_may_take_no_config(tmp_path: Path, config: DeepseekV3Config) -> None:
    text = SMALL + "def build_model(): return DeepseekV3(config)"
    assert on_meta(built(model_file(tmp_path, text), config))


def test_a_bare_model_is_imported_on_meta(tmp_path: Path, config: DeepseekV3Config) -> None:
    model = built(model_file(tmp_path, SMALL + "model = DeepseekV3(config)"), config)
    assert on_meta(model) and isinstance(model, DeepseekV3) and model.config.hidden_size == 64


def test_checkpoint_is_relative_to_the_file(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").symlink_to(folder)
    path = model_file(tmp_path, PLAIN.format(folder="weights"))
    monkeypatch.chdir("/")
    with open_user_file(path) as file:
        assert checkpoint_folder(file) == tmp_path / "weights"


def test_a_given_checkpoint_wins_over_the_file(tmp_path: Path, folder: Path) -> None:
    assert trace_file(model_file(tmp_path, PLAIN.format(folder="nowhere")), folder).checkpoint == folder


def test_a_policy_file_is_relative_to_the_file(tmp_path: Path) -> None:
    with open_user_file(model_file(tmp_path, PLAIN.format(folder="x").replace("deepseek_w4a8", "mine.yaml"))) as file:
        assert file.policy == str(tmp_path / "mine.yaml")


def test_a_file_may_import_its_neighbours(tmp_path: Path, config: DeepseekV3Config) -> None:
    (tmp_path / "neighbour_of_model.py").write_text(
        "from fxquant.models import DecoderLayer\nclass Mine(DecoderLayer): pass\n"
    )
    text = "from neighbour_of_model import Mine\n" + PLAIN.format(folder="x").replace(
        "(config)\n", "(config, layer=Mine)\n"
    )
    model = built(model_file(tmp_path, text), config)
    assert type(model.get_submodule("model.layers.0")).__name__ == "Mine"


def test_a_file_may_define_dataclasses(tmp_path: Path, config: DeepseekV3Config) -> None:
    """Dataclasses with postponed annotations look their module up in sys.modules."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text = head + "@dataclass\nclass Factor:\n    value: float\n" + PLAIN.format(folder="x")
    assert on_meta(built(model_file(tmp_path, text), config))


def test_accelerator_packages_are_stood_in_for_and_torch_does_not_see_them(tmp_path: Path) -> None:
    text = """
import triton
import triton.language as tl
from kernel import act_quant
from triton import Config
@triton.autotune(configs=[Config({"BLOCK": 1}, num_stages=2)], key=["N"])
@triton.jit
def compiled(x, BLOCK: tl.constexpr): ...
"""
    with open_user_file(model_file(tmp_path, text + PLAIN.format(folder="x"))):
        assert "triton" not in sys.modules and "kernel" not in sys.modules
        with pytest.raises(ModuleNotFoundError):
            import kernel  # noqa: F401


# refusing


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"nowhere: no such file or folder\. Pass a Hugging Face checkpoint folder"):
        open_source(tmp_path / "nowhere")


def test_neither_folder_nor_python(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(FxquantError, match=r"neither a folder nor a \.py file"):
        open_source(tmp_path / "model.txt")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not a checkpoint"):
        open_source(tmp_path)


BUILD = "\ndef build_model(config): ..."
WRONG = {
    "names no checkpoint": (BUILD, "names no CHECKPOINT.* --checkpoint DIR"),
    "checkpoint is no folder": ("CHECKPOINT = 'nowhere'" + BUILD, "CHECKPOINT 'nowhere' is not a folder"),
    "checkpoint is a number": ("CHECKPOINT = 3" + BUILD, "CHECKPOINT '?3'? is not a folder"),
    "syntax": ("def build_model(config:\n", "cannot be imported: SyntaxError"),
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: .*no_such_module_anywhere.*line 1: import"),
    "runs into an error": ("x = 1\ny = x / 0", r"ZeroDivisionError: division by zero \(line 2: y = x / 0\)"),
    "leaves of no classes": ("LEAVES = {'MoE': 1}" + BUILD, "LEAVES does not map module classes to adapters"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FxquantError, match=rf"model\.py: .*{message}"):
        trace_file(model_file(tmp_path, text))


def test_errors_name_the_line_when_the_file_is_named_by_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_file(tmp_path, "x = 1 / 0")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FxquantError, match=r"\(line 1: x = 1 / 0\)"):
        open_source(Path("model.py"))


WRONG_BUILD = {
    "absent": ("", "defines no build_model"),
    "not a function": ("build_model = 3", "defines no build_model"),
    "takes too much": ("def build_model(config, more): ...", "build_model failed: TypeError"),
    "fails": ("def build_model(config):\n    return config.nothing", "AttributeError.*line 2: return config.nothing"),
    "gives nothing": ("def build_model(config): ...", "build_model returned a NoneType. Return a torch.nn.Module"),
    "gives another model": (
        "import torch\ndef build_model(config): return torch.nn.Linear(2, 2)",
        "returned a Linear, whose forward takes input. Return a DeepSeek-V3: .*DeepseekV3ForCausalLM",
    ),
}


@pytest.mark.parametrize(("text", "message"), WRONG_BUILD.values(), ids=WRONG_BUILD.keys())
def test_wrong_build_model(tmp_path: Path, folder: Path, text: str, message: str) -> None:
    with pytest.raises(FxquantError, match=rf"model\.py: .*{message}"):
        trace_file(model_file(tmp_path, text), folder)


def test_an_error_that_names_its_place_is_kept(tmp_path: Path, folder: Path) -> None:
    text = "from fxquant.errors import FxquantError\ndef build_model(config): raise FxquantError('here', 'is a fact.')"
    with pytest.raises(FxquantError, match=r"^here: is a fact\.$"):
        open_source(model_file(tmp_path, text), folder)


def test_a_failed_import_leaves_the_path_as_it_was(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(FxquantError):
        trace_file(model_file(tmp_path, "import no_such_module_anywhere"))
    assert sys.path == before
