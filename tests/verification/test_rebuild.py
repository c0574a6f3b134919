"""`fxquant verify OUT --rebuild`: the bytes of weights derived from the source once more."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FEW_MODULES
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError, compile, verify
from fxquant.api import convert
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import MANIFEST, read_manifest
from fxquant.lowering.weights.digests import file_digest
from fxquant.policy.policy import MtpMode
from fxquant.storage.safetensors import TensorInfo, read_header
from fxquant.tools.main import app
from fxquant.verification import Rebuild, VerifyReport
from fxquant.verification.report import Check

DYNAMIC = "deepseek_w4a8_dynamic"
STATIC = "deepseek_w4a8"
PER_CHANNEL = "deepseek_w4a8_per_channel"
EXPERT = "model.layers.1.mlp.experts.1.down_proj"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> Callable[..., Path]:
    """`made(policy, target, mtp, **model)`: an output that was not looked at, once each. Do not write to it."""
    base = tmp_path_factory.mktemp("made")
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, base / "ids.safetensors")

    def get(policy: str = STATIC, target: Target = Target.ASCEND, mtp: MtpMode | None = None, **model: Any) -> Path:
        out = base / "-".join(str(part) for part in (policy, target, mtp, *model.values()))
        if not out.exists():
            source = tiny_folder(**FEW_MODULES, **model)
            calib = base / "ids.safetensors"
            compile(source, CompileOptions(policy=policy, out=out, target=target, calib=calib, mtp=mtp, verify=False))
        return out

    return get


@pytest.fixture
def out(compiled: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy to spoil; its manifest keeps pointing at the source."""
    original = compiled(fp8=True)
    copy = Path(shutil.copytree(original, tmp_path / "out"))
    source = str(read_manifest(original).checkpoint_path(original))
    edit(copy, lambda manifest: manifest.update(source=source, checkpoint=source))
    return copy


def edit(out: Path, change: Callable[[dict], object]) -> None:
    document = json.loads((out / MANIFEST).read_text())
    change(document)
    (out / MANIFEST).write_text(json.dumps(document, indent=2) + "\n")


def tensor_of(out: Path, name: str) -> TensorInfo:
    (file,) = out.glob("quant_model_weight*.safetensors")
    return read_header(file)[name]


def flip(info: TensorInfo) -> None:
    with info.file.open("r+b") as file:
        file.seek(info.start + info.nbytes // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def rebuilt(report: VerifyReport) -> Check:
    (check,) = (check for check in report.checks if check.name.startswith("rebuilt"))
    return check


def assert_rebuilt(out: Path) -> None:
    """All of it, and every other check holds too."""
    report = verify(out, rebuild=Rebuild())
    assert report.verdict == "verified", [miss for check in report.checks for miss in check.misses]
    assert rebuilt(report).checked == rebuilt(report).total == len(read_manifest(out).units)


SOURCES: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "fp8": {"fp8": True},
    "bias": {"attention_bias": True},
    "mtp float": {"mtp": MtpMode.FLOAT, "num_nextn_predict_layers": 1, "fp8": True},
    "mtp quant": {"mtp": MtpMode.QUANT, "num_nextn_predict_layers": 1, "fp8": True},
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "fp8" else pytest.mark.slow) for n in SOURCES])
def test_what_was_compiled_is_what_is_derived_again(name: str, compiled: Callable[..., Path]) -> None:
    assert_rebuilt(compiled(**SOURCES[name]))


@pytest.mark.slow
@pytest.mark.parametrize("target", list(Target))
def test_every_target(target: Target, compiled: Callable[..., Path]) -> None:
    assert_rebuilt(compiled(PER_CHANNEL if target is Target.VLLM_ASCEND else STATIC, target, fp8=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "start", "target"),
    [
        (STATIC, Target.ASCEND, Target.MINDIE),
        (STATIC, Target.MINDIE, Target.ASCEND),
        (STATIC, Target.ASCEND, Target.ONNX),
        (STATIC, Target.ASCEND, Target.MINDIE_2_1RC1),
        (PER_CHANNEL, Target.VLLM_ASCEND, Target.SGLANG_NPU),
        (PER_CHANNEL, Target.SGLANG_NPU, Target.VLLM_ASCEND),
        (PER_CHANNEL, Target.VLLM_ASCEND, Target.ASCEND),
    ],
)
def test_what_was_converted_comes_from_the_same_source(
    policy: str, start: Target, target: Target, compiled: Callable[..., Path], tmp_path: Path
) -> None:
    assert_rebuilt(convert(compiled(policy, start, fp8=True), target, tmp_path / "out", verify=False).out)


@pytest.mark.parametrize("fitted", [False, True], ids=["the digest tells", "a digest made to fit"])
@pytest.mark.parametrize("suffix", ["weight", "weight_scale_second"])
def test_a_flipped_byte_is_found_and_named(suffix: str, fitted: bool, out: Path) -> None:
    info = tensor_of(out, f"{EXPERT}.{suffix}")
    flip(info)
    if fitted:
        digest = file_digest(info.file, info.start, info.nbytes)
        edit(out, lambda manifest: manifest["units"][EXPERT]["digests"].update({suffix: digest}))
    report = verify(out, rebuild=Rebuild())
    assert report.verdict == "FAILED" and rebuilt(report).misses == [f"{EXPERT}.{suffix}: bytes differ"]
    (digests,) = (check for check in report.checks if check.name == "files: digest")
    assert digests.ok is fitted
    assert any("elements differ, first at" in miss for check in report.checks for miss in check.misses)


def test_a_kept_tensor_is_compared_too(out: Path) -> None:
    flip(tensor_of(out, "model.norm.weight"))
    assert rebuilt(verify(out, rebuild=Rebuild())).misses == ["model.norm.weight: bytes differ"]


def test_other_misses_do_not_hide_which_tensor_is_different(out: Path) -> None:
    """A tensor is gone, one has another dtype, one has other values, and config.json is not what was written."""
    (file,) = out.glob("quant_model_weight*.safetensors")
    tensors = load_file(file)
    wrong = [f"{EXPERT}.scale_bias", f"{EXPERT}.weight", "model.norm.weight"]
    tensors.pop(wrong[0])
    tensors[wrong[1]] = tensors[wrong[1]].to(torch.int32)
    tensors[wrong[2]] *= 2
    save_file(tensors, file)
    (out / "config.json").write_text("{}")
    report = verify(out, rebuild=Rebuild())
    assert sorted(rebuilt(report).misses) == sorted(f"{name}: bytes differ" for name in wrong)
    assert not next(check for check in report.checks if check.name == "config.json").ok


def test_a_sample_is_told_as_one(out: Path) -> None:
    check = rebuilt(verify(out, rebuild=Rebuild(3)))
    units = len(read_manifest(out).units)
    assert (check.checked, check.total, check.ok) == (3, units, True)
    result = CliRunner().invoke(app, ["verify", str(out), "--rebuild", "--sample", "3", "--quiet"])
    assert result.exit_code == 0 and f"3 of {units}" in result.output
    flip(tensor_of(out, f"{EXPERT}.weight"))
    result = CliRunner().invoke(app, ["verify", str(out), "--rebuild", "--quiet"])
    assert result.exit_code == 1 and f"{EXPERT}.weight: bytes differ" in " ".join(result.output.split())


def test_without_its_source_it_is_refused_with_the_way_out(out: Path, tiny_folder: Callable[..., Path]) -> None:
    source = str(read_manifest(out).checkpoint_path(out))
    edit(out, lambda manifest: manifest.update(checkpoint="gone", source="gone"))
    with pytest.raises(FxquantError, match="the source to rebuild it from is missing") as caught:
        verify(out, rebuild=Rebuild())
    assert caught.value.remedy == "Pass --against MODEL."
    assert verify(out, source, rebuild=Rebuild()).verdict == "verified"


def test_another_source_gives_other_bytes(out: Path, tiny_folder: Callable[..., Path]) -> None:
    report = verify(out, tiny_folder(**FEW_MODULES, fp8=True, seed=3), rebuild=Rebuild())
    assert f"{EXPERT}.weight: bytes differ" in rebuilt(report).misses


def test_a_sample_of_nothing_is_refused(out: Path) -> None:
    with pytest.raises(FxquantError, match="--sample 3: applies only to --rebuild"):
        CliRunner().invoke(app, ["verify", str(out), "--sample", "3"], catch_exceptions=False)
