"""Prepacked weights: the same logits from mapped files, which are written once, and whole or not at all."""

import shutil
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from onnx_graphs import emit, quantized

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.lowering.onnx import prepacked as module
from fxquant.lowering.onnx.runner import OnnxRunner

IDS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def output(tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tiny()
    return emit(quantized(checkpoint, "deepseek_w4a8"), checkpoint, tmp_path_factory.mktemp("onnx")).folder


def _logits(folder: Path, prepack: Path | None) -> torch.Tensor:
    return OnnxRunner(folder, prepack=prepack).prefill(IDS)[0]


def test_logits_are_those_of_the_model_itself(output: Path, tmp_path: Path):
    expected = _logits(output, None)
    assert _logits(output, tmp_path / "packed").equal(expected), "written"
    kept = [file for file in (tmp_path / "packed").rglob("*") if file.is_file()]
    assert sorted(file.name for file in kept) == ["model.onnx", "weights.bin"]
    times = [file.stat().st_mtime_ns for file in kept]
    assert _logits(output, tmp_path / "packed").equal(expected), "mapped"
    assert times == [file.stat().st_mtime_ns for file in kept]


def test_another_model_and_other_weights_get_a_folder_each(output: Path, tmp_path: Path):
    changed = tmp_path / "changed"
    shutil.copytree(output, changed)
    weights = next(changed.glob("*.safetensors"))
    packed = tmp_path / "packed"
    before = _logits(changed, packed)
    data = bytearray(weights.read_bytes())
    data[-64:] = bytes(64)
    weights.write_bytes(data)
    assert len(list(packed.iterdir())) == 1
    after = _logits(changed, packed)
    assert len(list(packed.iterdir())) == 2
    assert after.equal(_logits(changed, None)) and before.equal(_logits(output, None))


def test_nothing_is_kept_of_a_failed_write(output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "InferenceSession", broken)
        with pytest.raises(FxquantError, match="No space left on device"):
            module.prepacked(output / "model.onnx", tmp_path / "packed", onnxruntime.SessionOptions)
    assert not list((tmp_path / "packed").iterdir())


def test_a_file_in_place_of_the_folder(output: Path, tmp_path: Path):
    (tmp_path / "packed").write_text("mine")
    with pytest.raises(FxquantError, match="cannot hold prepacked weights"):
        OnnxRunner(output, prepack=tmp_path / "packed")
    assert (tmp_path / "packed").read_text() == "mine"
