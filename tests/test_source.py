"""MODEL as a user names it: folders, model.py files, and files that are wrong."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fxquant.errors import FxquantError
from fxquant.models import DecoderLayer, DeepseekV3
from fxquant.source import open_source

PLAIN = """
from fxquant.models import DeepseekV3

CHECKPOINT = {folder!r}
POLICY = "deepseek_w4a8"


def build_model(config):
    return DeepseekV3(config)
"""


@pytest.fixture
def folder(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder()


def model_file(path: Path, text: str) -> Path:
    (path / "model.py").write_text(text)
    return path / "model.py"


def on_meta(model: DeepseekV3) -> bool:
    return all(parameter.is_meta for parameter in model.parameters())


def test_a_folder_is_the_model_of_its_config(folder: Path) -> None:
    source = open_source(folder)
    assert type(source.model) is DeepseekV3 and on_meta(source.model)
    assert (source.checkpoint.folder, source.policy, source.name) == (folder, None, folder.name)


def test_a_file_builds_the_model_on_meta(tmp_path: Path, folder: Path) -> None:
    source = open_source(model_file(tmp_path, PLAIN.format(folder=str(folder))))
    assert on_meta(source.model)
    assert (source.checkpoint.folder, source.policy, source.name) == (folder, "deepseek_w4a8", folder.name)


def test_checkpoint_is_relative_to_the_file(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").symlink_to(folder)
    file = model_file(tmp_path, PLAIN.format(folder="weights"))
    monkeypatch.chdir("/")
    assert open_source(file).checkpoint.folder == tmp_path / "weights"


def test_a_given_checkpoint_wins_over_the_file(tmp_path: Path, folder: Path) -> None:
    file = model_file(tmp_path, PLAIN.format(folder="nowhere"))
    assert open_source(file, folder).checkpoint.folder == folder


def test_a_file_may_subclass_and_import_its_neighbours(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "neighbour_of_model.py").write_text(
        "from fxquant.models import DecoderLayer\nclass Mine(DecoderLayer): pass\n"
    )
    text = "from neighbour_of_model import Mine\n" + PLAIN.format(folder=str(folder))
    file = model_file(tmp_path, text.replace("(config)\n", "(config, layer=Mine)\n"))
    layer = open_source(file).model.model.layers[0]
    assert isinstance(layer, DecoderLayer) and type(layer).__name__ == "Mine"


def test_a_file_may_define_dataclasses(tmp_path: Path, folder: Path) -> None:
    """Dataclasses with postponed annotations look their module up in sys.modules."""
    head = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    text = head + "@dataclass\nclass Factor:\n    value: float\n" + PLAIN.format(folder=str(folder))
    assert on_meta(open_source(model_file(tmp_path, text)).model)


# refusing


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"nowhere: no such file or folder\. Name a Hugging Face checkpoint folder"):
        open_source(tmp_path / "nowhere")


def test_neither_folder_nor_python(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(FxquantError, match=r"neither a folder nor a \.py file"):
        open_source(tmp_path / "model.txt")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="not a checkpoint"):
        open_source(tmp_path)


WRONG = {
    "names no checkpoint": ("def build_model(config): ...", "names no CHECKPOINT.* --checkpoint DIR"),
    "checkpoint is no folder": ("CHECKPOINT = 'nowhere'", "CHECKPOINT 'nowhere' is not a folder"),
    "checkpoint is a number": ("CHECKPOINT = 3", "CHECKPOINT '?3'? is not a folder"),
    "syntax": ("def build_model(config:\n", "cannot be imported: SyntaxError"),
    "import": ("import no_such_module_anywhere", "ModuleNotFoundError: .*no_such_module_anywhere.*line 1: import"),
    "runs into an error": ("x = 1\ny = x / 0", r"ZeroDivisionError: division by zero \(line 2: y = x / 0\)"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FxquantError, match=rf"model\.py: .*{message}"):
        open_source(model_file(tmp_path, text))


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
    "takes nothing": ("def build_model(): ...", "build_model failed: TypeError"),
    "fails": ("def build_model(config):\n    return config.nothing", "AttributeError.*line 2: return config.nothing"),
    "gives nothing": ("def build_model(config): ...", "build_model gave a NoneType. Build fxquant.models.DeepseekV3"),
    "gives another model": ("import torch\ndef build_model(config): return torch.nn.Linear(2, 2)", "gave a Linear"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_BUILD.values(), ids=WRONG_BUILD.keys())
def test_wrong_build_model(tmp_path: Path, folder: Path, text: str, message: str) -> None:
    with pytest.raises(FxquantError, match=rf"model\.py: .*{message}"):
        open_source(model_file(tmp_path, text), folder)


def test_an_error_that_names_its_place_is_kept(tmp_path: Path, folder: Path) -> None:
    text = "from fxquant.errors import FxquantError\ndef build_model(config): raise FxquantError('here', 'is a fact.')"
    with pytest.raises(FxquantError, match=r"^here: is a fact\.$"):
        open_source(model_file(tmp_path, text), folder)


def test_a_failed_import_leaves_the_path_as_it_was(tmp_path: Path) -> None:
    before = list(sys.path)
    with pytest.raises(FxquantError):
        open_source(model_file(tmp_path, "import no_such_module_anywhere"))
    assert sys.path == before
