"""Static prediction layers on every target: stored by the formulas, verified, and a damaged scale of one is named."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kills import Killed
from output_folders import same_files
from safetensors.torch import load_file, save_file
from slowness import others_slow
from token_files import token_ids

from fxquant.api import compile, convert, plan, verify
from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.calibration.resume_folder import STATE
from fxquant.calibration.resume_state import load_state
from fxquant.compilation.options import CompileOptions
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.manifest import GRAPH, MANIFEST
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.policy.policy import MtpMode
from fxquant.program.program_file import load_program
from fxquant.runtime.stream import Block, Stream
from fxquant.schemes.schemes import Scheme
from fxquant.verification.weight_checks import check_static

Folder = Callable[..., Path]
STATIC = "deepseek_w4a8_per_channel_static"
POLICIES = {Target.ASCEND: "deepseek_w4a8", Target.MINDIE: "deepseek_w4a8", Target.MINDIE_2_1RC1: "deepseek_w4a8"}
POLICIES |= {Target.VLLM_ASCEND: STATIC, Target.SGLANG_NPU: STATIC}
TARGETS = others_slow(list(POLICIES), [Target.ASCEND, Target.VLLM_ASCEND])
ATTENTION = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
LAYER = "model.layers.2"


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return token_ids(tmp_path_factory.mktemp("text") / "ids.safetensors", seed=1)


def compiled(folder: Path, out: Path, ids: Path | None, target: Target = Target.ASCEND, **options: Any) -> Path:
    policy = options.pop("policy", POLICIES[target])
    given = {"policy": policy, "target": target, "mtp": MtpMode.QUANT, "calib": ids, "verify": False, "export": False}
    compile(folder, CompileOptions(**given | {"out": out} | options))
    return out


def described(out: Path, target: Target) -> dict[str, str]:
    return json.loads((out / ENGINES[target].description).read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_a_static_layer_is_stored_described_and_verified(
    target: Target, tiny_folder: Folder, ids: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1, fp8=True)
    out = compiled(folder, tmp_path / "out", ids, target)
    types, recipes = described(out, target), load_program(out / GRAPH).mtp.recipes
    for name in ATTENTION:
        for role in ("weight", "input_scale", "input_offset", "deq_scale", "quant_bias"):
            assert types[f"{LAYER}.self_attn.{name}.{role}"] == "W8A8"
        low, _ = load_calibration(out / CALIBRATION).ranges[f"{LAYER}.self_attn.{name}"]
        assert len(low) == 4
    assert types[f"{LAYER}.self_attn.kv_b_proj.weight"] == types[f"{LAYER}.eh_proj.weight"] == "FLOAT"
    assert types[f"{LAYER}.mlp.experts.0.up_proj.weight"] == "W8A8_DYNAMIC"
    shared = Scheme.W8A8 if POLICIES[target] == "deepseek_w4a8" else Scheme.W8A8_DYNAMIC
    assert recipes[f"{LAYER}.mlp.shared_experts.up_proj"].scheme is shared
    config = json.loads((out / "config.json").read_text())
    assert config["mtp_quantize"] == "w8a8_dynamic" and config["mla_quantize"] == "w8a8"
    assert verify(out, folder).verdict == "verified"


@pytest.mark.parametrize("role", ["input_scale", "input_offset", "deq_scale", "quant_bias", "weight"])
def test_a_damaged_tensor_of_a_layer_is_named(role: str, tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1)
    out = compiled(folder, tmp_path / "out", ids)
    module = f"{LAYER}.self_attn.o_proj"
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if f"{module}.{role}" in tensors:
            tensors[f"{module}.{role}"] += 1
            save_file(tensors, file, {"format": "pt"})
    (out / MANIFEST).unlink()
    report = verify(out, folder)
    misses = [miss for check in report.checks for miss in check.misses]
    assert not report.ok and any(f"{module}." in miss for miss in misses), misses
    alone = check_static(load_program(out / GRAPH), WeightFiles(out))
    assert role == "weight" or any(f"{module}." in miss for miss in alone.misses), alone.misses


def test_an_interrupted_calibration_resumes_in_a_prediction_layer(
    tiny_folder: Folder, ids: Path, tmp_path: Path
) -> None:
    folder = tiny_folder(num_nextn_predict_layers=2)
    whole = compiled(folder, tmp_path / "whole", ids)
    for block in ("before", "model.layers.2", "model.layers.3"):
        out = tmp_path / f"from {block}"
        with stopped_at(block, layers=2):
            compiled(folder, out, ids)
        left = load_state(out.with_name(f"{out.name}.calibrating") / STATE)
        assert ("hidden" in left.values) == (block != "model.layers.3")
        assert same_files(compiled(folder, out, ids), whole), block


@contextmanager
def stopped_at(name: str, layers: int) -> Iterator[None]:
    """Killed before the block of that name, of the graph of the prediction layers."""
    original = Stream.run

    def run(stream: Stream, block: Block, *arguments: Any) -> None:
        if block.name == name and len(stream.blocks) == 1 + layers:
            raise Killed
        original(stream, block, *arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stream, "run", run)
        yield


def test_without_text_the_error_names_the_layer(tiny_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=rf"those of {LAYER} too, need calibration text, none given"):
        compiled(tiny_folder(num_nextn_predict_layers=1), tmp_path / "out", None)


def test_a_policy_without_static_schemes_asks_for_no_text(tiny_folder: Folder, tmp_path: Path) -> None:
    out = compiled(tiny_folder(num_nextn_predict_layers=1), tmp_path / "out", None, policy="deepseek_w4a8_dynamic")
    program = load_program(out / GRAPH)
    assert {recipe.scheme for recipe in program.mtp.recipes.values()} == {Scheme.W8A8_DYNAMIC}
    assert str(program.rules[LAYER]) == "mtp → W8A8_DYNAMIC" and not (out / CALIBRATION).exists()


def test_a_policy_may_ask_for_dynamic_layers_beside_static_ones(tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: deepseek_w4a8\nrules: [{kind: mtp, scheme: W8A8_DYNAMIC}]")
    folder = tiny_folder(num_nextn_predict_layers=1)
    out = compiled(folder, tmp_path / "out", ids, policy=str(policy), mtp=None)
    assert {recipe.scheme for recipe in load_program(out / GRAPH).mtp.recipes.values()} == {Scheme.W8A8_DYNAMIC}


def test_mindie_reads_attention_of_the_layer_as_that_of_others(tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: deepseek_w4a8\nrules: [{kind: mtp, scheme: W8A8_DYNAMIC}]")
    folder = tiny_folder(num_nextn_predict_layers=1)
    with pytest.raises(FxquantError, match=r"W8A8_DYNAMIC, .* has W8A8; mla_quantize of config\.json is one type") as e:
        compiled(folder, tmp_path / "out", ids, Target.MINDIE, policy=str(policy), mtp=None)
    assert e.value.place == f"layer {LAYER}.self_attn.q_a_proj"


def test_both_schemes_of_apart_phases_reach_the_layer(tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1)
    out = compiled(folder, tmp_path / "out", ids, Target.VLLM_ASCEND, policy="deepseek_w8a8_mix")
    types = described(out, Target.VLLM_ASCEND)
    assert (
        types[f"{LAYER}.self_attn.o_proj.weight_scale"] == types[f"{LAYER}.self_attn.o_proj.input_scale"] == "W8A8_MIX"
    )
    assert verify(out, folder).verdict == "verified"


def test_plan_counts_what_is_written(tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    folder = tiny_folder(num_nextn_predict_layers=1)
    out = compiled(folder, tmp_path / "out", ids)
    planned = plan(folder, CompileOptions(policy=POLICIES[Target.ASCEND], mtp=MtpMode.QUANT))
    assert {(str(row.kind), str(row.scheme)) for row in planned.rows if row.kind == "mtp"} == {
        ("mtp", scheme) for scheme in ("W8A8", "W8A8_DYNAMIC", "FLOAT")
    }
    assert all((out / name).stat().st_size == size for name, size in planned.files.items())


def test_the_form_of_another_engine_keeps_the_ranges(tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    folder, into = tiny_folder(num_nextn_predict_layers=1), tmp_path / "converted"
    out = compiled(folder, tmp_path / "out", ids, Target.VLLM_ASCEND)
    convert(out, Target.SGLANG_NPU, into, verify=False)
    before, after = (load_program(path / GRAPH).mtp.recipes for path in (out, into))
    assert before == after and any(recipe.activation for recipe in after.values())
    assert verify(into, folder).verdict == "verified"
