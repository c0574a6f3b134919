"""The ONNX profile `ort`: int4 in MatMulNBits and QMoE, over weights that the files hold in their layout alone."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
import pytest
import torch
from output_folders import same_files
from safetensors.torch import load_file
from slowness import others_slow
from torch import Tensor

from fxquant import CompileOptions, FxquantError
from fxquant.api import compile, convert, plan, verify
from fxquant.compilation.onnx_options import OnnxOptions
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import AccuracyLevel, OnnxProfile
from fxquant.engines.table import Target
from fxquant.kernels.pack_int4 import unpack_blocks
from fxquant.lowering.onnx import write_onnx
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.onnx.runner import OnnxRunner
from fxquant.lowering.output_folder.manifest import GRAPH, MANIFEST
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.lowering.weights import Workers
from fxquant.ops.quantized import expand_int4
from fxquant.policy.policy import MtpMode
from fxquant.program.program_file import load_program

CONTRIB = "com.microsoft"
GROUPED = "grouped"
POLICIES = [GROUPED, "deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w4a8_shared_w4"]
Compiled = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder(moe_intermediate_size=128, n_routed_experts=4, n_group=2, topk_group=1)


@pytest.fixture(scope="module")
def compiled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(policy, profile, level)`, once each; `ort` is verified. Policy "grouped" has groups of 64."""
    base = tmp_path_factory.mktemp("compiled")
    rule = "{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64}"
    (base / "grouped.yaml").write_text(f"extends: deepseek_w4a8_dynamic\nrules:\n  - {rule}\n")
    calib = base / "calib.jsonl"
    calib.write_text("".join(f"{list(range(n, n + 40))}\n" for n in range(3, 60, 9)))

    def get(policy: str, profile: OnnxProfile = OnnxProfile.ORT, level: int | None = None) -> Path:
        out = base / f"{policy}-{profile}-{level}"
        if not out.exists():
            options = CompileOptions(
                policy=str(base / "grouped.yaml") if policy == GROUPED else policy,
                target=Target.ONNX,
                out=out,
                calib=calib,
                onnx_profile=profile,
                onnx_accuracy_level=level,
                verify=profile is OnnxProfile.ORT,
            )
            compile(source, options)
        return out

    return get


def model_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in (model.graph, *model.functions):
        yield from graph.node


@pytest.mark.parametrize("policy", others_slow(POLICIES, POLICIES[:2]))
@pytest.mark.parametrize("level", [0, 4])
def test_a_verified_folder_says_how_far_it_is(compiled: Compiled, source: Path, policy: str, level: int):
    report = verify(compiled(policy, level=level), source)
    assert report.ok, report
    (distance,) = [check for check in report.checks if check.name == "ONNX graph ≈ int8 per token"]
    assert distance.checked == distance.total > 0
    assert 0.0005 < float(distance.worst.split()[0]) < 0.05  # both sides round activations to eight bits, or one does
    assert report.end_to_end is not None
    assert 1e-7 < report.end_to_end.kl_mean < 0.1, "from the stored graph, which rounds otherwise: not last bits"


def test_its_own_operators_are_in_this_profile_alone(compiled: Compiled, source: Path):
    model = model_of(compiled("deepseek_w4a8_shared_w4"))
    own = [node.op_type for node in nodes(model) if node.domain == CONTRIB]
    assert sorted(set(own)) == ["MatMulNBits", "QMoE"]
    assert {opset.domain for opset in model.opset_import} == {"", "fxquant", CONTRIB}
    assert CONTRIB not in {opset.domain for opset in model_of(compiled("deepseek_w4a8", OnnxProfile.QDQ)).opset_import}
    onnx.checker.check_model(compiled("deepseek_w4a8_shared_w4") / "model.onnx", full_check=True)


@pytest.mark.parametrize("level", [0, 4])
def test_the_metadata_say_the_level(compiled: Compiled, tmp_path: Path, level: int):
    folder = compiled("deepseek_w4a8", level=level)
    assert stored_form(folder).accuracy_level is AccuracyLevel(level)
    model = model_of(folder)
    notes = {prop.key: prop.value for prop in model.metadata_props}
    words = {0: "float32, where the fxq operators have int8 per token", 4: "rounded to int8 by the block"}
    assert notes["profile"] == "ort" and words[level] in notes["numerics"]
    next(prop for prop in model.metadata_props if prop.key == "accuracy_level").value = "3"
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(FxquantError, match="the accuracy_level '3', which fxquant does not know"):
        stored_form(tmp_path)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def test_the_files_hold_the_codes_of_the_other_profiles_and_no_second_copy(compiled: Compiled):
    blocks, pairs = (tensors(compiled(GROUPED, profile)) for profile in (OnnxProfile.ORT, OnnxProfile.QDQ))
    experts = "model.layers.1.mlp.experts"
    gate_up, down = blocks[f"{experts}.gate_up_proj.weight"], blocks[f"{experts}.down_proj.weight"]
    assert gate_up.dtype is torch.uint8 and gate_up.shape == (4, 256, 128) and down.shape == (4, 256, 64)
    for expert in range(4):
        for projection, stored in (
            ("gate", gate_up[expert, 0::2]),
            ("up", gate_up[expert, 1::2]),
            ("down", down[expert]),
        ):
            name = f"{experts}.{expert}.{projection}_proj"
            assert torch.equal(unpack_blocks(stored), expand_int4(pairs[f"{name}.weight"], None))
            for role in ("weight_scale", "weight_scale_second"):
                stacked = blocks[f"{experts}.{projection}_proj.{role}"]
                assert torch.equal(stacked[expert], pairs[f"{name}.{role}"])
    ends = ("weight_offset", "weight_offset_second", "scale_bias")
    assert not any(name.endswith(ends) or f"{experts}.0." in name for name in blocks)
    same = [name for name in blocks if experts not in name]
    assert same and all(torch.equal(blocks[name], pairs[name]) for name in same)


def test_logits_are_near_those_of_qdq_and_a_step_is_a_full_forward(compiled: Compiled, source: Path):
    graphs = [compiled("deepseek_w4a8", level=level) for level in (0, 4)]
    reference = OnnxRunner(compiled("deepseek_w4a8", OnnxProfile.QDQ))
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    expected, _ = reference.prefill(ids)
    for folder in graphs:
        runner = OnnxRunner(folder)
        whole, _ = runner.prefill(ids)
        assert (whole - expected).norm() < 0.2 * expected.norm()  # a router's choice may flip
        first, caches = runner.prefill(ids[:, :8])
        mask, positions = torch.ones(2, 9, dtype=torch.int64), torch.full((2, 1), 8)
        step, _ = runner(ids[:, 8:], mask, positions, caches)
        assert torch.allclose(step, whole[:, 8:], rtol=1e-3, atol=1e-3)


def test_any_number_of_workers_and_reuse_give_the_same_bytes(compiled: Compiled, source: Path, tmp_path: Path):
    right = compiled("deepseek_w4a8_dynamic")
    for name, more in (("jobs", {"workers": Workers(jobs=1)}), ("reuse", {"reuse": right})):
        options = CompileOptions(
            policy="deepseek_w4a8_dynamic", target=Target.ONNX, out=tmp_path / name, onnx_profile=OnnxProfile.ORT,
            verify=False, max_shard_size=60_000 if name == "reuse" else 4 << 30, **more,
        )  # fmt: skip
        report = compile(source, options)
        if name == "reuse":
            assert report.output.work.reused and not report.output.work.quantized
            assert verify(tmp_path / name, source).ok
        else:
            assert same_files(tmp_path / name, right)


ORT, QDQ = (OnnxOptions(onnx_profile=profile) for profile in (OnnxProfile.ORT, OnnxProfile.QDQ))


def test_converted_from_another_profile_and_back_is_as_compiled(compiled: Compiled, tmp_path: Path):
    right, other = (compiled(GROUPED, profile) for profile in (OnnxProfile.ORT, OnnxProfile.QDQ))
    there = convert(
        other, Target.ONNX, tmp_path / "there", onnx=OnnxOptions(onnx_profile=OnnxProfile.ORT), verify=False
    ).out
    back = convert(
        right, Target.ONNX, tmp_path / "back", onnx=OnnxOptions(onnx_profile=OnnxProfile.QDQ), verify=False
    ).out
    for made, compiled_ in ((there, right), (back, other)):
        assert tensors(made).keys() == tensors(compiled_).keys()
        assert (made / GRAPH).read_bytes() == (compiled_ / GRAPH).read_bytes()
        for file in compiled_.glob("*.safetensors"):
            assert (made / file.name).read_bytes() == file.read_bytes()
        assert (made / "model.onnx").read_bytes() == (compiled_ / "model.onnx").read_bytes()


def test_one_byte_of_an_experts_row_is_found_and_named(compiled: Compiled, source: Path, tmp_path: Path):
    out = Path(shutil.copytree(compiled(GROUPED), tmp_path / "out"))
    (file,) = out.glob("*.safetensors")
    stack = load_file(file)["model.layers.1.mlp.experts.gate_up_proj.weight"]
    data, row = bytearray(file.read_bytes()), stack[2, 7].numpy().tobytes()  # of up_proj: the fourth
    assert data.count(row) == 1
    data[data.index(row) + 5] ^= 0x10
    file.write_bytes(bytes(data))
    report = verify(out, source)
    misses = {check.name: check.misses for check in report.checks if check.misses}
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert len(misses) == 2 and all(name in miss for found in misses.values() for miss in found), misses
    assert set(misses) == {"files: digest", "quantized tensors == slow reference"}


def test_without_a_manifest_its_files_say_enough(compiled: Compiled, source: Path, tmp_path: Path):
    out = Path(shutil.copytree(compiled(GROUPED), tmp_path / "out"))
    (out / MANIFEST).unlink()
    assert verify(out, source).ok


def test_prediction_layers_are_stored_module_by_module(tiny_folder: Callable[..., Path], tmp_path: Path):
    model = tiny_folder(num_nextn_predict_layers=1, n_routed_experts=2, n_group=1, topk_group=1)
    options = CompileOptions(
        policy="deepseek_w4a8_dynamic", target=Target.ONNX, out=tmp_path / "out", onnx_profile=OnnxProfile.ORT,
        mtp=MtpMode.QUANT,
    )  # fmt: skip
    compile(model, options)
    assert any(name.startswith("model.layers.2.mlp.experts.1.") for name in tensors(tmp_path / "out"))


def test_options_that_do_not_go_together(tiny_folder: Callable[..., Path], tmp_path: Path):
    onnx_, ort = Target.ONNX, OnnxProfile.ORT
    with pytest.raises(FxquantError, match=r"profile qdq has no operators of onnxruntime's own.*--onnx-profile ort"):
        CompileOptions(target=onnx_, onnx_accuracy_level=0)
    with pytest.raises(FxquantError, match="--onnx-accuracy-level 2: not a level. Pass 0.*or 4"):
        CompileOptions(target=onnx_, onnx_profile=ort, onnx_accuracy_level=2)
    with pytest.raises(FxquantError, match="--onnx-accuracy-level 0: target ascend has no ONNX graph"):
        CompileOptions(target=Target.ASCEND, onnx_accuracy_level=0)
    model, policy = (
        tiny_folder(hidden_size=264, n_routed_experts=2, n_group=1, topk_group=1),
        "deepseek_w4a8_per_channel",
    )
    options = CompileOptions(target=onnx_, onnx_profile=ort, policy=policy, out=tmp_path / "out")
    with pytest.raises(FxquantError, match=r"in_features 264 is no multiple of 16.*\n?.*--onnx-profile qdq"):
        compile(model, options)
    assert not (tmp_path / "out").exists()


def test_a_step_of_one_token_leaves_experts_idle(compiled: Compiled):
    logits, caches = OnnxRunner(compiled("deepseek_w4a8", level=4)).prefill(torch.tensor([[5]]))
    assert torch.isfinite(logits).all() and caches[0].shape[1] == 1


def test_plain_nodes_give_the_same(compiled: Compiled, tmp_path: Path):
    folder = compiled("deepseek_w4a8_shared_w4")
    plain = Path(shutil.copytree(folder, tmp_path / "plain"))
    program, files = load_program(plain / GRAPH), WeightFiles(plain)
    write_onnx(program, files.infos, plain, OnnxForm(OnnxProfile.ORT, inline=True))
    assert {node.domain for node in nodes(model_of(plain))} == {"", CONTRIB}
    ids = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(OnnxRunner(plain).prefill(ids)[0], OnnxRunner(folder).prefill(ids)[0])


def test_a_plan_has_the_sizes_of_the_files(compiled: Compiled, source: Path):
    out = compiled("deepseek_w4a8_dynamic")
    options = CompileOptions(policy="deepseek_w4a8_dynamic", target=Target.ONNX, onnx_profile=OnnxProfile.ORT)
    assert plan(source, options).files == {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
