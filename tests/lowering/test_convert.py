"""A compiled folder in the form of another engine: integers untouched, or refused with the command to make it anew."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FEW_MODULES
from typer.testing import CliRunner

from fxquant import CompileOptions, FxquantError
from fxquant.api import compile, convert, verify
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.lowering.output_folder.manifest import MANIFEST, STAMPS, read_manifest
from fxquant.policy.policy import MtpMode
from fxquant.tools.main import app

TWO_LEVEL, PER_CHANNEL = "deepseek_w4a8", "deepseek_w4a8_per_channel"
STATIC, EXPLICIT = "deepseek_w4a8_per_channel_static", "deepseek_w4a8_msmodelslim"
Compiled = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(num_nextn_predict_layers=1, **FEW_MODULES)


@pytest.fixture(scope="module")
def compiled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(target, policy, mtp)`, once each and not verified."""
    base = tmp_path_factory.mktemp("compiled")
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, base / "ids.safetensors")

    def get(target: Target, policy: str, mtp: MtpMode | None = None) -> Path:
        out = base / f"{target}-{policy}-{mtp}"
        if not out.exists():
            calib = base / "ids.safetensors"
            compile(source, CompileOptions(policy=policy, out=out, target=target, calib=calib, mtp=mtp, verify=False))
        return out

    return get


def different(here: Path, there: Path) -> list[str]:
    """Paths of files that are not the same bytes in both, but the manifest, which tells of paths, and the stamps, which
    tell of this machine."""
    names = {str(file.relative_to(folder)) for folder in (here, there) for file in folder.rglob("*") if file.is_file()}
    names -= {MANIFEST, STAMPS}
    same = (here / name for name in names if (here / name).is_file() and (there / name).is_file())
    equal = {str(f.relative_to(here)) for f in same if f.read_bytes() == (there / f.relative_to(here)).read_bytes()}
    return sorted(names - equal)


def converted(out: Path, target: Target, into: Path) -> Path:
    return convert(out, target, into, verify=False).out


def test_packed_to_unpacked_and_back(compiled: Compiled, tmp_path: Path) -> None:
    packed = compiled(Target.ASCEND, TWO_LEVEL)
    unpacked = converted(packed, Target.MINDIE_2_1RC1, tmp_path / "B")
    assert different(unpacked, compiled(Target.MINDIE_2_1RC1, TWO_LEVEL)) == []
    today = converted(unpacked, Target.MINDIE, tmp_path / "M")
    assert different(today, converted(packed, Target.MINDIE, tmp_path / "N")) == []
    assert different(converted(today, Target.MINDIE_2_1RC1, tmp_path / "O"), unpacked) == []
    again = converted(unpacked, Target.ASCEND, tmp_path / "A")
    assert different(again, packed) == []
    back, first = read_manifest(again), read_manifest(packed)
    assert (back.digests, back.weights) == (first.digests, first.weights)
    assert {name: unit.digests for name, unit in back.units.items()} == {
        name: unit.digests for name, unit in first.units.items()
    }


@pytest.mark.parametrize(
    ("target", "other"),
    [(Target.VLLM_ASCEND, Target.SGLANG_NPU), pytest.param(Target.ASCEND, Target.ONNX, marks=pytest.mark.slow)],
)
def test_one_form_under_two_names(compiled: Compiled, tmp_path: Path, target: Target, other: Target) -> None:
    policy = STATIC if target is Target.VLLM_ASCEND else TWO_LEVEL
    there = converted(compiled(target, policy), other, tmp_path / "there")
    assert different(there, compiled(other, policy)) == []
    assert different(converted(there, target, tmp_path / "back"), compiled(target, policy)) == []
    (old,), (new,) = (folder.glob("quant_model_weight*.safetensors") for folder in (compiled(target, policy), there))
    assert old.read_bytes() == new.read_bytes()


def test_dynamic_scales_of_the_models_dtype_fit_float32(compiled: Compiled, tmp_path: Path) -> None:
    """And they go back: the graph remembers that their values are the model's dtype's."""
    narrow = compiled(Target.VLLM_ASCEND, PER_CHANNEL)
    report = convert(narrow, Target.ASCEND, tmp_path / "A")
    assert report.verification is not None and report.verification.verdict == "verified"
    old, new = (load_file(next(folder.glob("quant_model_weight*"))) for folder in (narrow, tmp_path / "A"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
    again = converted(tmp_path / "A", Target.VLLM_ASCEND, tmp_path / "C")
    assert different(again, narrow) == []


REFUSED = {
    "two levels": (Target.ASCEND, TWO_LEVEL, Target.VLLM_ASCEND, "second scales have no place", TWO_LEVEL),
    "two levels, unpacked": (Target.MINDIE_2_1RC1, EXPLICIT, Target.VLLM_ASCEND, "second scales", PER_CHANNEL),
    "float32 scales": (Target.ASCEND, PER_CHANNEL, Target.VLLM_ASCEND, "weight scales need float32", PER_CHANNEL),
    "static without weight_scale": (Target.VLLM_ASCEND, STATIC, Target.ASCEND, "has weight_scale beside", STATIC),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_place_is_refused_with_a_command(
    compiled: Compiled, source: Path, tmp_path: Path, name: str
) -> None:
    start, policy, target, reason, anew = REFUSED[name]
    into = tmp_path / "anew"
    with pytest.raises(FxquantError, match=reason) as caught:
        convert(compiled(start, policy), target, into)
    assert caught.value.place.startswith("layer model.layers.") and not list(tmp_path.iterdir())
    command = shlex.split(re.search(r"fxquant (compile .*)", caught.value.remedy).group(1))
    assert command == ["compile", str(source.resolve()), "--policy", anew, "--target", str(target), "-o", str(into)]
    if anew in (STATIC, TWO_LEVEL):  # it takes calibration text, which lies beside a real model and not beside this one
        command += ["--calib", str(compiled(start, policy).parent / "ids.safetensors")]
    result = CliRunner().invoke(app, [*command, "--quiet", "--no-verify"], catch_exceptions=False)
    assert result.exit_code == 0 and different(into, compiled(target, anew)) == [], result.output


@pytest.mark.slow
@pytest.mark.parametrize("mtp", [MtpMode.FLOAT, MtpMode.QUANT])
def test_multi_token_prediction_layers_go_along(compiled: Compiled, tmp_path: Path, mtp: MtpMode) -> None:
    packed = compiled(Target.ASCEND, TWO_LEVEL, mtp)
    unpacked = converted(packed, Target.MINDIE_2_1RC1, tmp_path / "B")
    assert different(unpacked, compiled(Target.MINDIE_2_1RC1, TWO_LEVEL, mtp)) == []
    assert different(converted(unpacked, Target.ASCEND, tmp_path / "A"), packed) == []
    (description,) = unpacked.glob("quant_model_description*.json")
    types = {kind for name, kind in json.loads(description.read_text()).items() if name.startswith("model.layers.2.")}
    assert types == ({"FLOAT"} if mtp is MtpMode.FLOAT else {"FLOAT", "W8A8", "W8A8_DYNAMIC"})
    assert len(list(unpacked.glob("mtp_float-*"))) == (mtp is MtpMode.FLOAT)


def test_a_profile_changes_the_graph_alone(compiled: Compiled, tmp_path: Path) -> None:
    qdq = compiled(Target.ONNX, TWO_LEVEL)
    integer = convert(qdq, Target.ONNX, tmp_path / "A", onnx=OnnxOptions(onnx_profile=OnnxProfile.INTEGER))
    assert integer.verification is not None and integer.verification.ok
    assert different(qdq, integer.out) == ["model.onnx"]
    assert not different(qdq, convert(integer.out, Target.ONNX, tmp_path / "B", verify=False).out)


def test_a_cache_in_halves_brings_a_config_that_verify_reads(compiled: Compiled, tmp_path: Path) -> None:
    latent = compiled(Target.ONNX, TWO_LEVEL)
    halves = convert(latent, Target.ONNX, tmp_path / "A", onnx=OnnxOptions(onnx_cache=OnnxCache.HALVES))
    assert halves.verification is not None and halves.verification.ok
    assert different(latent, halves.out) == ["genai_config.json", "model.onnx"]
    config = halves.out / "genai_config.json"
    config.write_text(config.read_text().replace('"type": "decoder"', '"type": "llama"'))
    report = verify(halves.out)
    assert not report.ok
    misses = [miss for check in report.checks for miss in check.misses]
    assert any("genai_config.json: model" in miss and "llama" in miss for miss in misses), misses
    command = ["convert", str(latent), "--target", "onnx", "--onnx-cache", "expanded", "--onnx-last-logits"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "B")], catch_exceptions=False)
    assert result.exit_code == 0 and different(latent, tmp_path / "B") == ["model.onnx"], result.output


def test_ranks_are_checked_and_written_down(compiled: Compiled, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match="128 on each of 2 ranks is not a multiple of group_size 256"):
        convert(compiled(Target.ASCEND, TWO_LEVEL), Target.MINDIE, tmp_path / "B", tp=2)
    assert not list(tmp_path.iterdir())
    command = ["convert", str(compiled(Target.SGLANG_NPU, PER_CHANNEL)), "--target", "vllm-ascend", "--tp", "2"]
    result = CliRunner().invoke(app, [*command, "-o", str(tmp_path / "C")], catch_exceptions=False)
    assert result.exit_code == 0 and "vllm-ascend on 2 ranks" in result.output, result.output
    assert read_manifest(tmp_path / "C").tp == 2 and read_manifest(tmp_path / "C").target == "vllm-ascend"
