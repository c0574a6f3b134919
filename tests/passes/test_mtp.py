"""Multi-token prediction layers: absent, kept and quantized outputs are each complete, described and counted."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from slowness import others_slow
from tiny import write_checkpoint

from fxquant.api import compile, verify
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.compilation.ledger import Bucket
from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import Target
from fxquant.errors import FxquantError
from fxquant.policy.policy import MtpMode
from fxquant.program.program_file import load_program
from fxquant.verification.reference import expected_tensors

Folder = Callable[..., Path]
DYNAMIC = {Target.VLLM_ASCEND: "deepseek_w4a8_per_channel"}
LAYER = "model.layers.2."
TARGETS = [Target.ASCEND, Target.MINDIE_2_1RC1, Target.VLLM_ASCEND]
KEPT = [(Target.ASCEND, True), (Target.VLLM_ASCEND, False)]
SOURCES = others_slow([(target, fp8) for target in TARGETS for fp8 in (False, True)], KEPT)
LINEARS = 4 + 3 + 3 * 8  # q_a, q_b, kv_a, o; the shared expert; eight experts


def compiled(folder: Path, out: Path, target: Target, mtp: MtpMode | None) -> Path:
    policy = DYNAMIC.get(target, "deepseek_w4a8_dynamic")
    compile(folder, CompileOptions(policy=policy, out=out, target=target, mtp=mtp, verify=False))
    return out


def stored(out: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


def entries(out: Path) -> dict[str, str]:
    (file,) = out.glob("quant_model_description*.json")
    return {key: value for key, value in json.loads(file.read_text()).items() if key.startswith(LAYER)}


@pytest.mark.parametrize(("target", "fp8"), SOURCES)
def test_absent_layers_are_not_announced(target: Target, fp8: bool, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1, fp8=fp8)
    out = compiled(folder, tmp_path / "out", target, None)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
    assert not any(name.startswith(LAYER) for name in stored(out)) and not entries(out)


@pytest.mark.parametrize(("target", "fp8"), SOURCES)
def test_float_layers_are_the_checkpoints(target: Target, fp8: bool, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1, fp8=fp8)
    out, source = compiled(folder, tmp_path / "out", target, MtpMode.FLOAT), open_checkpoint(folder)
    tensors, described = stored(out), entries(out)
    names = [name for name in source.tensors if name.startswith(LAYER)]
    assert sorted(described) == sorted(names) and set(described.values()) == {"FLOAT"}
    for name in names:
        assert torch.equal(tensors[name], source.read(name).to(tensors[name].dtype)), name
        wide = name.endswith("e_score_correction_bias")
        assert tensors[name].dtype is (torch.float32 if wide else source.dtype)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    apart = sorted(file.name for file in out.glob("mtp_float*"))
    assert apart == ([] if target is Target.VLLM_ASCEND else ["mtp_float-00001-of-00001.safetensors"])
    (index,) = out.glob("*.safetensors.index.json")
    assert sorted(json.loads(index.read_text())["weight_map"]) == sorted(tensors)


@pytest.mark.parametrize("target", others_slow(TARGETS, [Target.VLLM_ASCEND]))
def test_quantized_layers_follow_the_formulas(target: Target, tiny_folder: Folder, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1)
    out, source = tmp_path / "out", open_checkpoint(folder)
    policy = DYNAMIC.get(target, "deepseek_w4a8_dynamic")
    report = compile(folder, CompileOptions(policy=policy, out=out, target=target, mtp=MtpMode.QUANT, verify=False))
    (assigned,) = (result for result in report.passes if result.name == "assign-mtp")
    assert len(assigned.rewritten) == 4 + 3 + 3
    tensors, described = stored(out), entries(out)
    assert Counter(described.values())["W8A8_DYNAMIC"] == 3 * LINEARS
    config = json.loads((out / "config.json").read_text())
    assert config["mtp_quantize"] == "w8a8_dynamic" and config["num_nextn_predict_layers"] == 1
    floats = [name for name, kind in described.items() if kind == "FLOAT"]
    assert f"{LAYER}eh_proj.weight" in floats and f"{LAYER}self_attn.kv_b_proj.weight" in floats
    entry = {entry.name: entry.bucket for entry in report.ledger.entries if entry.name.startswith(LAYER)}
    assert Counter(entry.values()) == {Bucket.REWRITTEN: LINEARS, Bucket.KEPT: len(floats)}
    for recipe in load_program(out / "fxquant_graph.json").mtp.recipes.values():
        for module in recipe.modules:
            for suffix, want in expected_tensors(recipe, source.read(f"{module}.weight"), None).items():
                assert torch.equal(tensors[f"{module}.{suffix}"], want)
    assert verify(out, folder).verdict == "verified"


def test_a_mode_replaces_the_policys_rule(tiny_folder: Folder, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: deepseek_w4a8_dynamic\nrules: [{kind: mtp, scheme: FLOAT}]")
    folder = tiny_folder(num_nextn_predict_layers=1)
    report = compile(folder, CompileOptions(policy=str(policy), out=tmp_path / "kept", verify=False))
    assert "mtp → FLOAT" in {why for _, why in report.ledger.totals()}
    none = compile(folder, CompileOptions(policy=str(policy), out=tmp_path / "none", mtp=MtpMode.NONE, verify=False))
    assert "mtp → LEAVE_OUT" in {why for _, why in none.ledger.totals()}


@pytest.mark.parametrize("scheme", ["W4A8_DYNAMIC", "W8A8_MIX"])
def test_a_scheme_that_a_whole_layer_cannot_have_is_refused(scheme: str, tiny_folder: Folder, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(f"extends: deepseek_w4a8_dynamic\nrules: [{{kind: mtp, scheme: {scheme}}}]")
    folder = tiny_folder(num_nextn_predict_layers=1)
    with pytest.raises(FxquantError, match=rf"gives {scheme} to model\.layers\.2"):
        compile(folder, CompileOptions(policy=str(policy), out=tmp_path / "out"))


def test_a_static_rule_without_static_linears_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: deepseek_w4a8_dynamic\nrules: [{kind: mtp, scheme: W8A8}]")
    folder = tiny_folder(num_nextn_predict_layers=1)
    with pytest.raises(FxquantError, match=r"finds no linear of model\.layers\.2 with a static scheme"):
        compile(folder, CompileOptions(policy=str(policy), out=tmp_path / "out"))


@pytest.mark.parametrize("mode", [MtpMode.FLOAT, MtpMode.QUANT])
def test_asking_for_layers_that_are_not_there_is_an_error(mode: MtpMode, tiny_folder: Folder, tmp_path: Path) -> None:
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out", mtp=mode)
    with pytest.raises(FxquantError, match="has no multi-token prediction layers"):
        compile(tiny_folder(), options)


def said(folder: Path, layers: int | None) -> Path:
    """`folder`, whose config.json now announces so many prediction layers, or says nothing of them."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | {"num_nextn_predict_layers": layers}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


@pytest.mark.parametrize("mode", [MtpMode.FLOAT, MtpMode.QUANT])
@pytest.mark.parametrize(
    ("held", "layers", "fact", "way_out"),
    [
        (1, 0, "says num_nextn_predict_layers: 0, but the checkpoint holds tensors of model.layers.2", "to 1."),
        (
            0,
            1,
            "says num_nextn_predict_layers: 1, but the checkpoint has no tensor of model.layers.2",
            "to 0, or leave",
        ),
        (0, None, "says num_nextn_predict_layers: 1, but the checkpoint has no tensor of model.layers.2", "leave"),
        (1, 2, "says num_nextn_predict_layers: 2, but the checkpoint has no tensor of model.layers.3", "to 1, or"),
    ],
)
def test_layers_that_config_json_and_the_checkpoint_disagree_on(
    held: int, layers: int | None, fact: str, way_out: str, mode: MtpMode, tmp_path: Path
) -> None:
    folder = said(write_checkpoint(tmp_path / "model", num_nextn_predict_layers=held), layers)
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out", mtp=mode)
    with pytest.raises(FxquantError, match=f"--mtp {mode}") as caught:
        compile(folder, options)
    assert fact in caught.value.fact and way_out in caught.value.remedy, caught.value
    assert not list(tmp_path.glob("out*"))


def test_unannounced_layers_are_named_without_the_option(tmp_path: Path) -> None:
    folder = said(write_checkpoint(tmp_path / "model", num_nextn_predict_layers=1), 0)
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out")
    with pytest.raises(FxquantError, match=r"tensor model\.layers\.2\.\S+ belongs to no parameter") as caught:
        compile(folder, options)
    assert "_predict_layers: 0. If the tensor is part of a prediction layer, raise the latter" in caught.value.remedy


def test_layers_that_config_json_does_not_speak_of_are_announced(tmp_path: Path) -> None:
    folder = said(write_checkpoint(tmp_path / "model", num_nextn_predict_layers=1), None)
    out = compiled(folder, tmp_path / "out", Target.VLLM_ASCEND, MtpMode.FLOAT)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 1
    assert verify(out, folder).verdict == "verified"


INCOMPLETE = ["eh_proj", "self_attn.o_proj", "mlp.experts.5.up_proj", "shared_head.head"]


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prediction layers, announced and held."""
    return write_checkpoint(tmp_path_factory.mktemp("mtp") / "model", num_nextn_predict_layers=2)


def without(folder: Path, name: str, into: Path) -> Path:
    """`folder` without the tensors whose name begins so."""
    shutil.copytree(folder, into)
    for file in into.glob("*.safetensors"):
        kept = {key: tensor for key, tensor in load_file(file).items() if not key.startswith(name)}
        save_file(kept, file, {"format": "pt"})
    for index in into.glob("*.index.json"):
        document = json.loads(index.read_text())
        held = {key: file for key, file in document["weight_map"].items() if not key.startswith(name)}
        index.write_text(json.dumps(document | {"weight_map": held}))
    return into


@pytest.mark.parametrize("mode", [MtpMode.FLOAT, MtpMode.QUANT])
@pytest.mark.parametrize("module", [f"{name}.weight" for name in INCOMPLETE] + ["mlp.gate.e_score_correction_bias"])
def test_a_layer_that_lacks_a_tensor_is_refused_by_its_name(
    module: str, mode: MtpMode, two_layers: Path, tmp_path: Path
) -> None:
    folder = without(two_layers, f"model.layers.3.{module}", tmp_path / "model")
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out", mtp=mode)
    with pytest.raises(FxquantError, match=rf"tensor model\.layers\.3\.{module} is missing") as caught:
        compile(folder, options)
    assert "--mtp none" in caught.value.remedy and not (tmp_path / "out").exists()
    compile(folder, CompileOptions(policy="float", out=tmp_path / "none", mtp=MtpMode.NONE, verify=False))


def test_a_layer_of_two_is_refused_when_a_policy_keeps_it(two_layers: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: deepseek_w4a8_dynamic\nrules: [{kind: mtp, scheme: FLOAT}]")
    folder = without(two_layers, "model.layers.3.", tmp_path / "model")
    with pytest.raises(FxquantError, match=r"model\.layers\.3 is not in the checkpoint or left out, model\.layers\.2"):
        compile(folder, CompileOptions(policy=str(policy), out=tmp_path / "out"))


def test_no_layer_is_announced_where_the_source_is_silent(tmp_path: Path) -> None:
    """transformers takes a config.json without the key for one layer."""
    folder = said(write_checkpoint(tmp_path / "model"), None)
    out = compiled(folder, tmp_path / "out", Target.ASCEND, None)
    assert json.loads((out / "config.json").read_text())["num_nextn_predict_layers"] == 0
