"""The reference quantizer's own folders, where they lie beside this repository: verified as they are, and converted.

They are cut: embedding and head are in their descriptions, but not in their files. They are looked at as they lie
there, and with what is missing put back from the model.
"""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fxquant
from fxquant.engines.table import Target

REFERENCE = Path(__file__).parents[3] / "shared" / "conformance" / "msmodelslim"
MODEL = REFERENCE / "model"
FOLDERS = {"v0_bf16_ascendV1": Target.ASCEND, "v1_bf16": Target.VLLM_ASCEND}
CUT = ("lm_head.weight", "model.embed_tokens.weight")

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="the reference quantizer's folders are not here")


def whole(name: str, place: Path) -> Path:
    """A copy with the tensors and the config.json that it lacks."""
    folder = place / name
    folder.mkdir()
    for file in (REFERENCE / name).iterdir():
        shutil.copyfile(file, folder / file.name)
    (file,) = folder.glob("*.safetensors")
    source = load_file(MODEL / "model.safetensors")
    save_file({**load_file(file), **{name: source[name] for name in CUT}}, file)
    if not (folder / "config.json").is_file():
        shutil.copyfile(MODEL / "config.json", folder / "config.json")
    return folder


@pytest.mark.parametrize("name", FOLDERS)
def test_as_it_lies_there_only_what_was_cut_is_missing(name: str) -> None:
    report = fxquant.verify(REFERENCE / name, against=MODEL)
    misses = [miss for check in report.checks for miss in check.misses]
    assert misses and all("config.json: missing" in miss or any(cut in miss for cut in CUT) for miss in misses)
    compared = {check.name: check.checked for check in report.checks}
    assert compared["quantized weights ≈ source, within half a step"] == 83


@pytest.mark.parametrize("name", FOLDERS)
def test_whole_it_is_verified(name: str, tmp_path: Path) -> None:
    report = fxquant.verify(whole(name, tmp_path), against=MODEL)
    assert [miss for check in report.checks for miss in check.misses] == []
    assert report.verdict == "verified"
    assert any(f"contract of {FOLDERS[name]}" in check.name for check in report.checks)


def test_what_its_config_says_of_the_attention_is_told(tmp_path: Path) -> None:
    """v1 writes `mla_quantize: w8a8_dynamic` over static attention; the engine of that form does not read it."""
    report = fxquant.verify(whole("v1_bf16", tmp_path), against=MODEL)
    assert "mla_quantize: 'w8a8_dynamic', the tensors are w8a8" in report.unread["config.json"]


@pytest.mark.parametrize(("name", "target"), [("v0_bf16_ascendV1", Target.ASCEND), ("v1_bf16", Target.SGLANG_NPU)])
def test_it_converts(name: str, target: Target, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = fxquant.convert(whole(name, tmp_path), target, out, against=MODEL, export=False)
    assert report.verification is not None and report.verification.verdict == "verified"
    described = json.loads((out / "quant_model_description.json").read_text())
    assert described["group_size"] == (256 if name.startswith("v0") else 0)
