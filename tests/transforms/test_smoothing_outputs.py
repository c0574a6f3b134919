"""Smoothing as outputs, calibration files and `verify` have it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from token_files import token_ids

from fxquant import CompileOptions, FxquantError, compile, verify
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.transforms.weight_transforms import WeightTransforms

M4 = "deepseek_w4a8_msmodelslim_m4"
TARGETS = ("ascend", "mindie", "onnx")
FLEX = "smooth: [{method: flex}]"


def policy_of(folder: Path, text: str, parent: str = "deepseek_w4a8") -> str:
    (folder / "policy.yaml").write_text(f"extends: {parent}\n{text}")
    return str(folder / "policy.yaml")


@pytest.mark.parametrize("target", TARGETS)
def test_scaled_experts_reach_every_output(
    tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path, target: str
) -> None:
    """`compile` verifies all of them: integers from the source, graph and engine's reader."""
    policy = policy_of(tmp_path, FLEX)
    options = CompileOptions(policy=policy, out=tmp_path / "out", target=target, calib=ids, export=False)  # type: ignore[arg-type]
    report = compile(tiny_folder(fp8=True), options)
    assert report.verification is not None and report.verification.ok
    scales = load_calibration(tmp_path / "out" / CALIBRATION).transforms.scales
    assert any(".mlp.experts." in name for name in scales)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


@pytest.fixture(scope="module")
def m4(tiny_folder: Callable[..., Path], ids: Path) -> Path:
    """A smoothed output. Do not write to it."""
    options = CompileOptions(policy=M4, out=ids.parent / "m4", calib=ids, export=False, verify=False)
    return compile(tiny_folder(), options).out


@pytest.mark.parametrize("target", TARGETS)
def test_biases_reach_every_output(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path, target: str) -> None:
    """Weight file, description, graph and engine's reader: `compile` verifies all of them."""
    out = tmp_path / "out"
    options = CompileOptions(policy=M4, out=out, target=target, calib=ids, export=False)  # type: ignore[arg-type]
    report = compile(tiny_folder(fp8=True), options)
    assert report.verification is not None and report.verification.ok
    stored = {
        name: tensor for file in out.glob("quant_model_weight*.safetensors") for name, tensor in load_file(file).items()
    }
    description = json.loads(next(iter(out.glob("quant_model_description*.json"))).read_text())
    norms = [name for name in stored if "norm.bias" in name]
    assert len(norms) == 2 * 4 + 1 and all(stored[name].dtype is torch.float32 for name in norms)
    linears = [f"model.layers.0.self_attn.{name}.bias" for name in ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")]
    assert all(description[name] == "FLOAT" for name in (*norms, *linears))
    if target != "onnx":
        assert any("add_rms_norm_bias" in file.read_text() for file in out.glob("*.py"))


@pytest.mark.parametrize(
    "changes", [{"dtype": torch.float16}, {"q_lora_rank": None}, {"attention_bias": True}], ids=str
)
@pytest.mark.parametrize("policy", ["m4", "flex"])
def test_other_models(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path, changes: dict, policy: str) -> None:
    name = M4 if policy == "m4" else policy_of(tmp_path, FLEX)
    report = compile(tiny_folder(**changes), CompileOptions(policy=name, out=tmp_path / "out", calib=ids, export=False))
    assert report.verification is not None and report.verification.ok


def test_a_saved_calibration_has_the_smoothing(tiny_folder: Callable[..., Path], ids: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    compile(tiny_folder(), CompileOptions(policy=M4, out=first, calib=ids, export=False, verify=False))
    saved = first / CALIBRATION
    compile(tiny_folder(), CompileOptions(policy=M4, out=second, calibration=saved, export=False, verify=False))
    assert (first / CALIBRATION).read_bytes() == (second / CALIBRATION).read_bytes()
    for file in first.glob("quant_model_weight*.safetensors"):
        assert file.read_bytes() == (second / file.name).read_bytes()
    other = policy_of(tmp_path, "smooth: [{kind: attention, method: m4, alpha: 0.6}]", M4)
    with pytest.raises(FxquantError, match="the file has other smoothing than policy"):
        compile(tiny_folder(), CompileOptions(policy=other, out=tmp_path / "third", calibration=saved))


def damaged(transforms: WeightTransforms) -> list[Callable[[], object]]:
    """Ways to spoil a smoothing that leave it well formed."""
    norm = "model.layers.0.input_layernorm"
    return [
        lambda: transforms.scales[f"{norm}.weight"].mul_(2),
        lambda: transforms.tensors[f"{norm}.bias"].add_(1),
        lambda: transforms.tensors["model.layers.0.self_attn.q_a_proj.bias"].mul_(1.5),
        lambda: transforms.columns.pop("model.layers.0.self_attn.q_b_proj.weight"),
        lambda: transforms.rows.pop("model.layers.0.self_attn.kv_b_proj.weight"),
        transforms.shifts[f"{norm}.weight"].zero_,
    ]


@pytest.mark.parametrize("which", range(6))
def test_verify_knows_a_function_that_changed(
    tiny_folder: Callable[..., Path], m4: Path, tmp_path: Path, which: int
) -> None:
    out = shutil.copytree(m4, tmp_path / "out")
    (out / "fxquant_manifest.json").unlink()
    calibration = load_calibration(out / CALIBRATION)
    damaged(calibration.transforms)[which]()
    calibration.save(out / CALIBRATION)
    report = verify(out, against=tiny_folder())
    assert not report.ok and any("smoothing" in check.name and check.misses for check in report.checks)
