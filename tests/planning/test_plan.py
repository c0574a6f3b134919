"""What `plan` says is what `compile` writes, to the byte; and it says the same from a config.json alone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated_once
from measured import MACHINE, Measured
from places import EXAMPLE
from safetensors.torch import save_file
from slowness import POLICIES, others_slow
from tiny import write_checkpoint

import fxquant
from fxquant import CompileOptions, FxquantError, Plan
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engines.table import ENGINES, Target
from fxquant.kernels.gptq import BLOCK
from fxquant.planning.estimate import PER_WORKER_BYTES, Memory, estimate
from fxquant.planning.host_benchmark import COPY, GPTQ, GPTQ_FEEDBACK, GPTQ_INVERSE, kernel_name
from fxquant.policy.policy import LEAVE_OUT, MtpMode, shipped_policies
from fxquant.schemes.schemes import WeightAlgorithm
from fxquant.tools.main import run

__all__ = ["calibrated_once"]
Folder = Callable[..., Path]


def planned(model: Path, policy: str, **options: Any) -> Plan:
    return fxquant.plan(model, CompileOptions(policy=policy, **options), measuring=Measured())


def sizes(folder: Path, names: Any) -> dict[str, int]:
    return {name: (folder / name).stat().st_size for name in names}


def check_compiled(model: Path, policy: str, target: Target, ids: Path, out: Path, **options: Any) -> None:
    """Both are refused with one error, or the plan's files are what is written, down to the sizes."""
    given = {"policy": policy, "target": target, **options}
    try:
        plan = planned(model, **given)
    except FxquantError as refused:
        with pytest.raises(FxquantError) as error:
            fxquant.compile(model, CompileOptions(out=out, calib=ids, verify=False, **given))
        assert (error.value.place, error.value.fact) == (refused.place, refused.fact)
        return
    fxquant.compile(model, CompileOptions(out=out, calib=ids, verify=False, **given))
    assert plan.files == sizes(out, sorted(file.name for file in out.glob("*.safetensors")))
    assert plan.documents == sizes(out, plan.documents)
    engine = ENGINES[target]
    assert (engine.index in plan.documents) == (out / engine.index).exists()
    assert {"config.json", engine.description} <= plan.documents.keys()
    checkpoint = open_checkpoint(model)
    assert plan.bytes_in + left_out(plan) == checkpoint.nbytes
    headers = sum(8 + int.from_bytes(file.open("rb").read(8), "little") for file in out.glob("*.safetensors"))
    assert sum(row.bytes_out for row in plan.rows) == sum(plan.files.values()) - headers


def left_out(plan: Plan) -> int:
    return sum(row.bytes_in for row in plan.rows if row.scheme == LEAVE_OUT)


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids to calibrate on."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(3, 128, (2, 16), generator=torch.Generator().manual_seed(1))}, file)
    return file


PAIRS = [(policy, target) for policy in shipped_policies() for target in Target]
FAST = [(POLICIES[0], Target.ASCEND), (POLICIES[1], Target.VLLM_ASCEND), (POLICIES[2], Target.MINDIE)]


@pytest.mark.parametrize(("policy", "target"), others_slow(PAIRS, FAST))
def test_shipped_policies_on_every_target(
    policy: str, target: Target, tiny_folder: Folder, ids: Path, tmp_path: Path
) -> None:
    model = tiny_folder(moe_intermediate_size=512, num_nextn_predict_layers=1, shards=2)
    check_compiled(model, policy, target, ids, tmp_path / "out", max_shard_size=1_000_000)


SOURCES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "fp8": {"fp8": True, "num_nextn_predict_layers": 1},
    "odd fp8": {"fp8": True, "kv_lora_rank": 48, "q_lora_rank": 96, "intermediate_size": 320},
    "shards": {"shards": 3},
    "biases": {"attention_bias": True},
    "no latent queries": {"q_lora_rank": None},
    "no shared experts": {"n_shared_experts": 0},
    "two prediction layers": {"num_nextn_predict_layers": 2, "fp8": True},
}


@pytest.mark.parametrize("source", others_slow(SOURCES, ["fp8", "biases"]))
@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w8a8_mix", "float"])
def test_every_kind_of_checkpoint(source: str, policy: str, tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    check_compiled(tiny_folder(**SOURCES[source]), policy, Target.ASCEND, ids, tmp_path / "out")


@pytest.mark.parametrize("target", others_slow(Target, [Target.ASCEND]))
@pytest.mark.parametrize("mtp", MtpMode)
def test_prediction_layers(mtp: MtpMode, target: Target, tiny_folder: Folder, ids: Path, tmp_path: Path) -> None:
    model = tiny_folder(fp8=True, num_nextn_predict_layers=1)
    policy = "deepseek_w4a8_dynamic" if target is not Target.VLLM_ASCEND else "deepseek_w4a8_per_channel"
    check_compiled(model, policy, target, ids, tmp_path / "out", mtp=mtp, max_shard_size=700_000)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "target"), PAIRS)
def test_the_example(policy: str, target: Target, ids: Path, tmp_path: Path) -> None:
    check_compiled(EXAMPLE, policy, target, ids, tmp_path / "out")


# a config.json alone


def same_from_its_config(model: Path, folder: Path, policy: str, **options: Any) -> None:
    folder.mkdir()
    shutil.copy(model / "config.json", folder)
    known = planned(model, policy, **options)
    for described in (planned(folder, policy, **options), planned(folder / "config.json", policy, **options)):
        assert described.input_kind == "config.json" and known.input_kind == "checkpoint folder"
        compared = ("rows", "work", "files", "documents", "operators", "unverified")
        assert [getattr(described, key) for key in compared] == [getattr(known, key) for key in compared]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mtp", [None, MtpMode.FLOAT, MtpMode.QUANT])
def test_a_config_is_enough(source: str, mtp: MtpMode | None, tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder(**SOURCES[source])
    if mtp is None or "num_nextn_predict_layers" in SOURCES[source]:
        same_from_its_config(model, tmp_path / "config", "deepseek_w4a8", mtp=mtp)


def test_the_dtype_that_is_not_said_is_bfloat16(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", fp8=True)
    config = json.loads((model / "config.json").read_text())
    del config["torch_dtype"]
    (model / "config.json").write_text(json.dumps(config))
    same_from_its_config(model, tmp_path / "config", "deepseek_w4a8_dynamic")


def test_a_model_file_over_a_config(tiny_folder: Folder, tmp_path: Path) -> None:
    model = tiny_folder(fp8=True)
    shutil.copy(model / "config.json", tmp_path)
    lines = ("from fxquant.models import DeepseekV3 as build_model", f"CHECKPOINT = {str(tmp_path)!r}")
    (tmp_path / "model.py").write_text("\n".join(lines))
    assert planned(tmp_path / "model.py", "deepseek_w4a8").rows == planned(model, "deepseek_w4a8").rows


# 671 billion parameters

PUBLISHED = Path(str(resources.files("fxquant") / "models" / "deepseek_v3_671b.json"))


@pytest.fixture(scope="module")
def published() -> Plan:
    return planned(PUBLISHED, "deepseek_w4a8_per_channel")


@pytest.mark.slow
def test_671b_counts(published: Plan) -> None:
    decoder = [row for row in published.rows if row.kind != "mtp"]
    assert sum(row.parameters for row in decoder) == 671_026_419_200
    assert sum(row.modules for row in decoder if row.scheme != "FLOAT") + 61 == 45_032  # kv_b_proj stays float


@pytest.mark.slow
def test_671b_per_channel_arithmetic(published: Plan) -> None:
    experts = next(row for row in published.rows if row.kind == "routed_expert")
    hidden, width, count = 7168, 2048, 58 * 256
    assert experts.modules == 3 * count and experts.parameters == 3 * count * hidden * width
    rows_gate_up, rows_down = 2 * count * width, count * hidden
    scales = 8 * (rows_gate_up + rows_down)
    scale_bias = 4 * (rows_gate_up + 16 * rows_down)
    assert experts.bytes_out == experts.parameters // 2 + scales + scale_bias
    assert published.bytes_out == pytest.approx(355e9, rel=0.005)


@pytest.mark.slow
def test_671b_memory_of_the_command() -> None:
    """Of both processes together, at their largest."""
    code = (
        "import sys; from fxquant.tools.main import run; from fxquant.processes.memory import peak_bytes\n"
        f"sys.argv = ['fxquant', 'plan', {str(PUBLISHED)!r}, '-p', 'deepseek_w4a8_dynamic', '--json']\n"
        "try: run()\n"
        "except SystemExit: pass\n"
        "print(peak_bytes(), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    document = json.loads(done.stdout)
    assert 0 < int(done.stderr) + document["machine"]["peak_bytes"] < 1e9
    assert document["bytes_out"] == sum(document["files"].values()) + sum(document["documents"].values())


# what cannot be planned


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["fxquant", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run()
    printed = capsys.readouterr()
    assert stop.value.code == 1 and printed.out == "" and len(printed.err.splitlines()) <= 24
    return " ".join(printed.err.replace("│", " ").split())


def test_errors_are_one_screen(monkeypatch: Any, capsys: Any, tmp_path: Path, tiny_folder: Folder) -> None:
    assert "no such file" in refused(monkeypatch, capsys, tmp_path / "none")
    assert "it has no config.json" in refused(monkeypatch, capsys, tmp_path)
    assert "policy none unknown" in refused(monkeypatch, capsys, tiny_folder(), "-p", "none")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "are dense" in refused(monkeypatch, capsys, tmp_path)
    words = refused(monkeypatch, capsys, tiny_folder(), "-p", "deepseek_w4a8_msmodelslim", "-t", "vllm-ascend")
    assert "target vllm-ascend refuses it" in words


def test_a_wrong_checkpoint_is_refused_as_compile_does(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", shards=2)
    next(model.glob("model-00002-*")).unlink()
    with pytest.raises(FxquantError, match="missing shard"):
        planned(model, "deepseek_w4a8_dynamic")
    for file in model.glob("*.safetensors"):
        file.unlink()
    assert planned(model, "deepseek_w4a8_dynamic").input_kind == "config.json"


# time and memory


def test_the_work_of_every_algorithm_is_counted(tmp_path: Path) -> None:
    """Under names that the measurement knows: gate and up of an expert share one inverse."""
    rule = "{{kind: routed_expert, scheme: W4A8_DYNAMIC, group_size: 64, algorithm: {}}}"
    for algorithm in WeightAlgorithm:
        policy = tmp_path / f"{algorithm}.yaml"
        policy.write_text(f"description: one\nextends: deepseek_w4a8\nrules: [{rule.format(algorithm)}]\n")
        work = planned(EXAMPLE, str(policy)).work
        assert kernel_name(4, 64, True, algorithm.scales) in work and GPTQ.isdisjoint(work) != algorithm.from_inputs
    config = json.loads((EXAMPLE / "config.json").read_text())
    experts = config["n_routed_experts"] * (config["num_hidden_layers"] - config["first_k_dense_replace"])
    hidden, width = config["hidden_size"], config["moe_intermediate_size"]
    assert work[GPTQ_INVERSE] == experts * (hidden**3 + width**3)
    assert work[GPTQ_FEEDBACK] == experts * hidden * width * (2 * (hidden + BLOCK) + width + BLOCK)


def test_the_estimate_is_its_arithmetic() -> None:
    work = {kernel_name(4, 0, False): 40 * 10**9, COPY: 20 * 10**9}
    estimated = estimate(60 * 10**9, 30 * 10**9, work, MACHINE, None, 5.0)
    assert (estimated.read, estimated.write, estimated.workers) == (30.0, 30.0, 2)
    assert estimated.compute == {kernel_name(4, 0, False): 20.0, COPY: 1.0}
    assert estimated.total == 60.0 + 5.0 and estimated.complete
    faster = replace(MACHINE, disk_read=100.0, disk_write=100.0)
    assert estimate(60 * 10**9, 30 * 10**9, work, faster, 1, 5.0).total == 42.0 + 5.0
    assert estimate(0, 0, work, faster, 64, 0.0).workers == 2, "more workers than cores do not help"
    unknown = replace(MACHINE, disk_read=None, disk_write=None, disk_unknown="why")
    estimated = estimate(60 * 10**9, 30 * 10**9, work, unknown, None, 5.0)
    assert estimated.total == 21.0 + 5.0 and not estimated.complete
    estimated = estimate(0, 0, work, replace(MACHINE, kernels={COPY: 10.0}), None, 5.0)
    assert estimated.total == 1.0 + 5.0 and not estimated.complete and list(estimated.compute.values()) == [None, 1.0]
    assert Memory(100, 10, 3).peak == 110 + 3 * PER_WORKER_BYTES


@pytest.mark.usefixtures("measured_machine")
def test_the_command_says_its_arithmetic(monkeypatch: Any, capsys: Any, tiny_folder: Folder) -> None:
    arguments = ["fxquant", "plan", str(tiny_folder()), "-p", "deepseek_w4a8_dynamic", "--cores", "32", "--disk", "3"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        run()
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "/ 3.00 GB/s" in text and "/ 32 workers" in text and "32 workers × 16.8 MB" in text
    monkeypatch.setattr(sys, "argv", [*arguments, "--json", "--jobs", "4"])
    with pytest.raises(SystemExit):
        run()
    document = json.loads(capsys.readouterr().out)
    assert document["time"]["workers"] == 4 and document["machine"]["cores"] == 32
    assert document["machine"]["disk_read"] == document["machine"]["disk_write"] == 3.0
