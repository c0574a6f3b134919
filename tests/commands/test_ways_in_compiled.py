"""The six ways in, compiled: the same weight files. transformers 4 is installed for it, beside the environment."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from places import EXAMPLE, MODEL_FILES
from traced_files import files_traced_once

import fxquant
from fxquant import CompileOptions
from fxquant.errors import FxquantError
from fxquant.frontend.source import open_source
from fxquant.program.program_file import dump_program
from fxquant.program.structural_hash import structural_hash

__all__ = ["files_traced_once"]
WAYS = {
    "folder": None,
    "own model.py": "own.py",
    "transformers 5": "hugging_face.py",
    "transformers 4": "hugging_face.py",
    "DeepSeek's classes": "deepseek_style.py",
    "own MoE in LEAVES": "researcher.py",
}
TRANSFORMERS_4 = ("transformers>=4.57,<5", "huggingface-hub<1", "tokenizers>=0.22,<=0.23.0", "requests", "urllib3")
TRANSFORMERS_4 += ("charset-normalizer", "idna", "certifi")
"""It, and what it needs beyond, or in other versions than, this environment."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def transformers_4(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("transformers_4")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *TRANSFORMERS_4]
    subprocess.run(command, check=True, capture_output=True)
    return str(folder)


@pytest.fixture
def way(
    request: pytest.FixtureRequest, transformers_4: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:  # fmt: skip
    """The MODEL of a way in; its process is this test's, which sees transformers 4 where that is the way."""
    if request.param == "transformers 4":
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([transformers_4, os.environ.get("PYTHONPATH", "")]).strip(":"))
    name = WAYS[request.param]
    return EXAMPLE if name is None else MODEL_FILES / name


def compiled(model: Path, checkpoint: Path | None, out: Path) -> Path:
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=out, checkpoint=checkpoint, verify=False)
    return fxquant.compile(model, options).out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, compiled. No correction bias of it is negative: to gates of transformers 4 it is the same model."""
    return compiled(EXAMPLE, None, tmp_path_factory.mktemp("plain") / "out")


@pytest.mark.parametrize("way", WAYS, indirect=True)
def test_the_same_weight_files(way: Path, plain: Path, tmp_path: Path) -> None:
    checkpoint = EXAMPLE if way.suffix == ".py" else None
    known, program = open_source(EXAMPLE).program(), open_source(way, checkpoint).program()
    assert structural_hash(program) == structural_hash(known)
    assert dump_program(program) == dump_program(known)
    assert digests(compiled(way, checkpoint, tmp_path / "way")) == digests(plain)


@pytest.mark.parametrize("way", ["transformers 5", "transformers 4"], indirect=True)
def test_each_version_is_told_apart(way: Path, request: pytest.FixtureRequest) -> None:
    version = request.node.callspec.params["way"]
    assert open_source(way, EXAMPLE).input_kind.startswith(f"model.py, {version}")


@pytest.mark.parametrize("way", ["transformers 4"], indirect=True)
def test_a_gate_that_masks_with_0_is_refused_where_a_bias_is_negative(
    way: Path, tiny_folder: Callable[..., Path]
) -> None:
    with pytest.raises(FxquantError, match="masks the groups that it does not choose with 0"):
        open_source(way, tiny_folder())


def digests(out: Path) -> dict[str, str]:
    """Of what an engine loads: weights, their description, the graph."""
    names = ("*.safetensors", "quant_model_description.json", "model_ascend.py", "fxquant_*graph.json")
    files = sorted(file for pattern in names for file in out.glob(pattern))
    assert len(files) >= 5
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
