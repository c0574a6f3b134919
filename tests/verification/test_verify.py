"""Verification catches what is wrong with an output, and says where."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.api import open_output
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.lowering.output_folder.manifest import MANIFEST, read_manifest
from fxquant.program.program_file import load_program
from fxquant.runtime.divergence import divergence
from fxquant.runtime.execute import execute
from fxquant.verification import VerifyReport
from fxquant.verification.blocks import block_names, one_of_each_kind, probe_inputs, walk

TARGETS = (Target.ASCEND, Target.ONNX)
WEIGHTS = "quant_model_weight_w8a8.safetensors"
EXPERT = "model.layers.1.mlp.experts.3.down_proj"
STATIC = "model.layers.0.self_attn.q_a_proj"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Callable[..., Path]) -> dict[Target, Path]:
    """The same tiny FP8 model for both targets, calibrated on token ids."""
    folder = tmp_path_factory.mktemp("compiled")
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, folder / "ids.safetensors")
    outs = {}
    for target in TARGETS:
        calib, out = folder / "ids.safetensors", folder / target
        options = CompileOptions(target=target, out=out, calib=calib, verify=False)
        outs[target] = fxquant.compile(tiny_folder(fp8=True), options).out
    return outs


@pytest.fixture
def out(compiled: dict[Target, Path], tmp_path: Path, tiny_folder: Callable[..., Path]) -> Path:
    """A copy to spoil; its manifest keeps pointing at the source."""
    copy = Path(shutil.copytree(compiled[Target.ASCEND], tmp_path / "out"))
    source = str(tiny_folder(fp8=True).resolve())
    edit_json(copy / MANIFEST, lambda manifest: manifest.update(source=source, checkpoint=source))
    return copy


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document, indent=2) + "\n")


def edit_weights(out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite the weight file with `change` applied, and make the manifest believe its size."""
    with safe_open(out / WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in list(file.keys())}
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / WEIGHTS)
    edit_json(out / MANIFEST, lambda manifest: manifest["files"].update({WEIGHTS: (out / WEIGHTS).stat().st_size}))


def misses(report: VerifyReport) -> str:
    return "\n".join(f"{check.name}: {miss}" for check in report.checks for miss in check.misses)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fresh_output_is_verified(compiled: dict[Target, Path], target: Target) -> None:
    report = fxquant.verify(compiled[target])
    assert report.verdict == "verified", misses(report)
    assert all(check.checked >= check.total for check in report.checks)
    assert all(check.total > 0 for check in report.checks)


@pytest.mark.parametrize("profile", OnnxProfile)
def test_an_onnx_graph_is_compared_end_to_end(
    compiled: dict[Target, Path], tmp_path: Path, profile: OnnxProfile
) -> None:
    """A session of the whole model, from the graph in the folder rather than the one that was emitted."""
    out = fxquant.convert(
        compiled[Target.ONNX], Target.ONNX, tmp_path / "out", onnx=OnnxOptions(onnx_profile=profile), verify=False
    ).out
    program, read = open_output(out)
    inputs = list(probe_inputs(program).values())
    logits, _ = OnnxRunner(out)(*inputs[:3], inputs[3:])
    report = fxquant.verify(out)
    assert report.end_to_end == divergence(logits, execute(program, read, [inputs])[0][0])
    assert report.noise is not None and report.noise.tokens == 8 * report.end_to_end.tokens
    told = report.as_json()
    assert told["end_to_end"]["kl_max"] == report.end_to_end.kl_max and told["logit_noise"] == report.noise.logit


def test_an_onnx_graph_says_what_it_was_made_from(compiled: dict[Target, Path], tmp_path: Path) -> None:
    out = fxquant.convert(compiled[Target.ASCEND], Target.ONNX, tmp_path / "out", verify=False).out
    written, model = (out / "model.onnx").read_bytes(), onnx.load(out / "model.onnx", load_external_data=False)
    assert written == (compiled[Target.ONNX] / "model.onnx").read_bytes()
    notes = {prop.key: prop.value for prop in model.metadata_props}
    source = read_manifest(out).checkpoint_path(out)
    assert (notes["policy"], notes["source"]) == ("deepseek_w4a8", source.name)
    assert str(source.parent).encode() not in written
    next(prop for prop in model.metadata_props if prop.key == "policy").value = "float"
    (out / "model.onnx").write_bytes(model.SerializeToString(deterministic=True))
    assert "files: digest: model.onnx" in misses(fxquant.verify(out))
    (out / MANIFEST).unlink()
    alone = fxquant.verify(out, against=source)
    assert "policy and source" in alone.unread["model.onnx"]


def test_a_sample_says_that_it_was_not_compared_end_to_end(
    compiled: dict[Target, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fxquant.verification.run.SAMPLE_ABOVE", 0)
    report = fxquant.verify(compiled[Target.ONNX])
    assert (report.verdict, report.end_to_end) == ("sample verified", None)
    assert report.unread["model.onnx"].startswith("end to end")


def test_without_its_source_it_is_structure_only(out: Path) -> None:
    edit_json(out / MANIFEST, lambda manifest: manifest.update(checkpoint="gone", source="gone"))
    assert fxquant.verify(out).verdict == "structure only"


CORRUPTIONS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], None], str]] = {
    "one nibble": (lambda t: t[f"{EXPERT}.weight"][0, 0].bitwise_xor_(1), f"{EXPERT}.weight: 1 elements differ"),
    "swapped nibbles": (
        lambda t: t.update({f"{EXPERT}.weight": (t[f"{EXPERT}.weight"] << 4) | (t[f"{EXPERT}.weight"] >> 4 & 15)}),
        f"{EXPERT}.weight",
    ),
    "shifted group": (
        lambda t: t.update({f"{EXPERT}.weight_scale_second": t[f"{EXPERT}.weight_scale_second"] + 1}),
        f"{EXPERT}.weight_scale_second",
    ),
    "zero scale_bias": (lambda t: t[f"{EXPERT}.scale_bias"].zero_(), f"{EXPERT}.scale_bias"),
    "gate and up swapped": (
        lambda t: t.update({f"{EXPERT[:-9]}up_proj.weight": t[f"{EXPERT[:-9]}gate_proj.weight"].clone()}),
        f"{EXPERT[:-9]}up_proj.weight",
    ),
    "offset by one": (lambda t: t[f"{STATIC}.input_offset"].add_(1), f"{STATIC}.input_offset"),
    "input scale": (lambda t: t[f"{STATIC}.input_scale"].mul_(2), f"{STATIC}.input_scale"),
    "deq_scale": (lambda t: t[f"{STATIC}.deq_scale"].mul_(2), f"{STATIC}.deq_scale"),
    "quant_bias": (lambda t: t[f"{STATIC}.quant_bias"][3].add_(1), f"{STATIC}.quant_bias of output 3"),
    "kept tensor": (lambda t: t["model.norm.weight"].mul_(2), "model.norm.weight: differs from the source"),
    "dropped tensor": (lambda t: t.pop(f"{EXPERT}.scale_bias"), f"{EXPERT}.scale_bias: missing"),
    "dtype": (
        lambda t: t.update({f"{EXPERT}.scale_bias": t[f"{EXPERT}.scale_bias"].bfloat16()}),
        f"{EXPERT}.scale_bias: torch.bfloat16",
    ),
    "extra tensor": (lambda t: t.update(extra=torch.zeros(1)), "extra: in the files, not in the graph"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_corrupted_weights_are_named(out: Path, name: str) -> None:
    change, words = CORRUPTIONS[name]
    edit_weights(out, change)
    report = fxquant.verify(out)
    assert report.verdict == "FAILED"
    assert words in misses(report)


def test_wrong_description_is_named(out: Path) -> None:
    key = f"{EXPERT}.weight"
    edit_json(out / "quant_model_description.json", lambda description: description.update({key: "W8A8"}))
    assert f"{key}: 'W8A8', the graph says 'W4A8_DYNAMIC'" in misses(fxquant.verify(out))


def test_truncated_weight_file_is_an_error(out: Path) -> None:
    file = out / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FxquantError, match="truncated"):
        fxquant.verify(out)


def test_an_edited_ascend_graph_is_never_run(out: Path) -> None:
    path = out / "model_ascend.py"
    path.write_text(path.read_text() + "\nraise SystemExit('this ran')\n")
    assert "model_ascend.py" in misses(fxquant.verify(out))
    edit_json(out / MANIFEST, lambda manifest: manifest["files"].update({path.name: path.stat().st_size}))
    with pytest.raises(FxquantError, match=r"model_ascend\.py"):
        fxquant.verify(out)


def test_another_source_does_not_verify(out: Path, tiny_folder: Callable[..., Path]) -> None:
    report = fxquant.verify(out, against=tiny_folder(fp8=True, seed=7))
    assert "quantized tensors == slow reference" in misses(report)


def test_an_onnx_weight_that_points_elsewhere_is_caught(compiled: dict[Target, Path], tmp_path: Path) -> None:
    out = Path(shutil.copytree(compiled[Target.ONNX], tmp_path / "out"))
    model = onnx.load(out / "model.onnx", load_external_data=False)
    weights = [t for t in model.graph.initializer if t.external_data and "q_b_proj" in t.name and len(t.dims) == 2]
    weight = next(tensor for tensor in weights if tensor.dims[0] == weights[0].dims[0])
    entry = next(entry for entry in weight.external_data if entry.key == "offset")
    entry.value = str(int(entry.value) + 64)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    size = (out / "model.onnx").stat().st_size
    edit_json(out / MANIFEST, lambda manifest: manifest["files"].update({"model.onnx": size}))
    assert "ONNX graph" in misses(fxquant.verify(out))


def test_a_sample_runs_one_block_of_each_kind(compiled: dict[Target, Path]) -> None:
    program = load_program(compiled[Target.ASCEND] / "fxquant_graph.json")
    from fxquant.lowering.output_folder.weight_files import WeightFiles

    sample = one_of_each_kind(program)
    assert sample == ["before", "model.layers.0", "model.layers.1", "after"] == block_names(program)
    seen = [
        block for block, _ in walk(program, WeightFiles(compiled[Target.ASCEND]).read, {"before", "model.layers.1"})
    ]
    assert seen == ["before", "model.layers.1"]
