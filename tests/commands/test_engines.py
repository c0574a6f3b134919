"""Every target end to end: of its files the engine's reader makes the graph's numbers, on as many ranks as fit."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated_once
from places import EXAMPLE
from safetensors.torch import load_file, save_file
from tiny import random_tensors, tiny_config, write_shards
from torch import Tensor

import fxquant
from fxquant import CompileOptions, FxquantError
from fxquant.api import open_output
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.engine_readers import Arithmetic
from fxquant.engines.documents import group_size
from fxquant.engines.table import ENGINES, Target
from fxquant.evaluation.divergence import log_probabilities, logits
from fxquant.evaluation.engine_perplexity import reader_perplexity
from fxquant.program.program import Program
from fxquant.runtime.weight_providers import Read
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.text.load import load_batches

__all__ = ["calibrated_once"]
NPU = [Target.ASCEND, Target.MINDIE, Target.MINDIE_2_1RC1, Target.VLLM_ASCEND, Target.SGLANG_NPU]
FAST = (Target.ASCEND, Target.VLLM_ASCEND)
FORMATS = [
    pytest.param(Target.ASCEND, id="packed", marks=pytest.mark.slow),
    pytest.param(Target.MINDIE_2_1RC1, id="unpacked"),
    pytest.param(Target.VLLM_ASCEND, id="per_channel"),
]
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
SHAPE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64}
WIDE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 256, "moe_intermediate_size": 1024, "n_routed_experts": 2, "n_group": 1,
    "topk_group": 1, "num_attention_heads": 16, "num_key_value_heads": 16, "v_head_dim": 8, "qk_nope_head_dim": 8,
}  # fmt: skip
"""A down_proj of which 16 ranks get 64 each, the least that the int4 kernels take."""
RANKS = [
    pytest.param(target, ranks, marks=() if ranks in (1, 16) and target in FAST else pytest.mark.slow)
    for target in NPU
    for ranks in (1, 2, 4, 8, 16)
]


def tensors_of(out: Path) -> dict[str, Tensor]:
    return {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token ids to calibrate a tiny random model on."""
    file = tmp_path_factory.mktemp("ids") / "ids.safetensors"
    save_file({"ids": torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))}, file)
    return file


@pytest.mark.parametrize(("target", "ranks"), RANKS)
def test_ranks_share_a_wide_model(target: Target, ranks: int, tiny_folder: Callable, tmp_path_factory: Any) -> None:
    """SGLang keeps int4 experts whole, so each of its ranks has one of sixteen."""
    whole = target is Target.SGLANG_NPU
    source = tiny_folder(**WIDE | ({"n_routed_experts": 16} if whole else {}))
    out = tmp_path_factory.getbasetemp() / f"wide-{target}"
    if not out.exists():
        options = CompileOptions(policy="deepseek_w4a8_per_channel", target=target, out=out, tp=16, verify=False)
        if whole:
            with pytest.raises(FxquantError, match="experts that 16 ranks split are read wrong"):
                fxquant.compile(source, options)
            options = replace(options, ep=16)
        fxquant.compile(source, options)
    report = fxquant.verify(out, source, tp=ranks, ep=ranks if whole else None)
    assert report.verdict == "verified", [check.misses for check in report.checks]
    name = "" if ranks == 1 else f" on {ranks} ranks" + (", experts whole" if whole else "")
    assert any(check.name.endswith(f"{name}: results ≈ graph") and check.checked > 9 for check in report.checks)


def test_onnx_runs_in_one_process(tiny_folder: Callable, tmp_path: Path) -> None:
    source = tiny_folder(**SHAPE)
    options = CompileOptions(policy="deepseek_w4a8_per_channel", target=Target.ONNX, out=tmp_path / "out")
    assert fxquant.compile(source, options).verification.verdict == "verified"
    misses = [miss for check in fxquant.verify(tmp_path / "out", source, tp=2).checks for miss in check.misses]
    assert len(misses) == 1 and "one process" in misses[0]


# the same values in another dtype


def grid(values: Tensor) -> Tensor:
    """The nearest multiple of 2**-7 that float8_e4m3fn has: exact in bfloat16, float16, and FP8 of that scale."""
    return (values * 128).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 128


def write_source(folder: Path, dtype: torch.dtype, fp8: bool = False, bias: torch.dtype = torch.float32) -> Path:
    """A tiny checkpoint of grid values, the correction bias in `bias`; as `tiny.write_checkpoint` otherwise."""
    config = tiny_config(torch_dtype=str(dtype).removeprefix("torch."), **SHAPE)
    stored: dict[str, Tensor] = {}
    for name, values in random_tensors(config, seed=3).items():
        exact = grid(values)
        if name == BIAS:
            stored[name] = exact.to(bias)
        elif fp8 and name.endswith(("_proj.weight", "_proj_with_mqa.weight")):
            stored[name] = (exact * 128).to(torch.float8_e4m3fn)
            blocks = [-(-size // 128) for size in values.shape]
            stored[f"{name}_scale_inv"] = torch.full(blocks, 1 / 128)
        else:
            stored[name] = exact.to(dtype)
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
        }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_shards(folder, stored)
    return folder


SOURCES: dict[str, tuple[torch.dtype, bool, torch.dtype]] = {
    "bf16": (torch.bfloat16, False, torch.float32),
    "bf16 bias": (torch.bfloat16, False, torch.bfloat16),
    "fp16": (torch.float16, False, torch.float32),
    "fp8": (torch.bfloat16, True, torch.float32),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", FORMATS)
def test_equal_values_of_any_dtype_give_equal_integers(target: Target, tmp_path: Path) -> None:
    """format `per_channel` rounds scales to the model's dtype, so there float16 has integers of its own."""
    tensors = {}
    for name, (dtype, fp8, bias) in SOURCES.items():
        out, source = tmp_path / name / "out", write_source(tmp_path / name / "model", dtype, fp8, bias)
        policy = "deepseek_w4a8_per_channel"
        fxquant.compile(source, CompileOptions(policy=policy, target=target, out=out, verify=False))
        tensors[name] = tensors_of(out)
        assert tensors[name][BIAS].dtype is torch.float32
        assert torch.equal(tensors[name][BIAS], tensors["bf16"][BIAS]), "its values are exact in bfloat16 too"
    narrow = ENGINES[target].weight_format(0) is WeightFormat.PER_CHANNEL
    for name in tensors:
        if name == "fp16" and narrow:
            continue
        assert tensors[name].keys() == tensors["bf16"].keys()
        integers = [key for key, tensor in tensors[name].items() if not tensor.is_floating_point()]
        assert len(integers) == 8 * 3 + 3 + 3 + 2 * 4
        assert all(torch.equal(tensors[name][key], tensors["bf16"][key]) for key in integers), name


# linear biases


@pytest.mark.parametrize("target", FORMATS)
def test_a_bias_is_stored_once_and_folded_once(
    target: Target, ids: Path, tiny_folder: Callable, tmp_path: Path
) -> None:
    source = tiny_folder(attention_bias=True, **SHAPE)
    options = CompileOptions(
        policy="deepseek_w4a8_per_channel_static", target=target, out=tmp_path / "out", calib=ids, verify=False
    )
    out = fxquant.compile(source, options).out
    stored, checkpoint = tensors_of(out), open_checkpoint(source)
    biases = [name for name in checkpoint.tensors if name.endswith("_proj.bias") or name.endswith("_mqa.bias")]
    assert sorted(biases) == sorted(name for name in stored if name.endswith(".bias")) and len(biases) == 2 * 3
    wide = ENGINES[target].weight_format(0).float32_parameters
    for name in biases:
        module, bias = name.removesuffix(".bias"), checkpoint.read(name)
        assert stored[name].dtype is (torch.float32 if wide else checkpoint.dtype)
        assert torch.equal(stored[name].float(), bias.float())
        folded = bias.float() / stored[f"{module}.deq_scale"]
        shift = float(stored[f"{module}.input_offset"]) * stored[f"{module}.weight"].sum(1, dtype=torch.int64)
        assert stored[f"{module}.quant_bias"].tolist() == torch.round(folded.double() - shift).tolist()
        assert bool((torch.round(folded).abs() > 1).any()), "twice or never would show"
    assert fxquant.verify(out, source).verdict == "verified"


# the trained example

POLICIES = {
    Target.ASCEND: "deepseek_w4a8",
    Target.MINDIE: "deepseek_w4a8",
    Target.MINDIE_2_1RC1: "deepseek_w4a8_dynamic",
    Target.VLLM_ASCEND: "deepseek_w4a8_per_channel_static",
    Target.SGLANG_NPU: "deepseek_w4a8_dynamic",
}
SAMPLES, LENGTH, FEW = 16, 128, 2
"""Documents and their tokens; so many of them show that the device's rounding is another, but not by how much."""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Target, str], Path]:
    """`example(target, policy)`: the trained model, compiled and verified once."""
    base = tmp_path_factory.mktemp("example")

    def get(target: Target, policy: str) -> Path:
        out = base / f"{target}-{policy}"
        if not out.exists():
            report = fxquant.compile(EXAMPLE, CompileOptions(policy=policy, target=target, out=out))
            assert report.verification is not None and report.verification.verdict == "verified"
        return out

    return get


@pytest.mark.slow
@pytest.mark.parametrize("target", NPU)
@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_the_example_on_ranks(example: Callable, target: Target, ranks: int) -> None:
    """Its experts are 256 wide: four ranks get the 64 that the int4 kernels need, eight are refused.

    SGLang keeps its eight experts whole: eight ranks get one each, and without expert parallelism it is refused.
    """
    out = example(target, "deepseek_w4a8_per_channel")
    whole = target is Target.SGLANG_NPU
    report = fxquant.verify(out, EXAMPLE, tp=ranks, ep=ranks if whole else None)
    misses = [f"{check.name}: {miss}" for check in report.checks for miss in check.misses]
    if ranks <= (8 if whole else 4):
        assert report.verdict == "verified", misses
    else:
        fact = "8 experts do not split over 16" if whole else "not a multiple of 64"
        assert all(miss.startswith("contract of") for miss in misses) and fact in " ".join(misses)
    if whole or ranks > 4:
        words = (
            "experts that . ranks split|8 heads do not split over 16" if whole else "not a multiple of 64|do not split"
        )
        options = CompileOptions(policy="deepseek_w4a8_per_channel", target=target, out=out / "none", tp=ranks)
        with pytest.raises(FxquantError, match=words):
            fxquant.compile(EXAMPLE, options)


def perplexity(program: Program, read: Read, batches: list[Tensor]) -> float:
    """Of the graph itself."""
    pairs = zip(batches, logits(program, read, batches), strict=True)
    scores = torch.cat([log_probabilities(scores).gather(-1, ids[:, 1:, None]).flatten() for ids, scores in pairs])
    return math.exp(-float(scores.mean()))


@pytest.mark.slow
@pytest.mark.parametrize("target", NPU)
def test_perplexity_through_the_engines_arithmetic(example: Callable, target: Target) -> None:
    """EXACT is the graph's but for the order of sums, and what an engine rounds scales to on load: 2**-11 at most."""
    out = example(target, POLICIES[target])
    program, read = open_output(out)
    batches = load_batches(EXAMPLE / "evaluation.jsonl", open_checkpoint(EXAMPLE), SAMPLES, LENGTH)
    graph = perplexity(program, read, batches)
    engine = ENGINES[target]
    assert engine.open_reader is not None
    reader = engine.open_reader(out, 1, group_size(program))
    exact = reader_perplexity(program, reader, read, batches, Arithmetic.EXACT)
    few, kernel = (reader_perplexity(program, reader, read, batches[:FEW], arithmetic) for arithmetic in Arithmetic)
    print(f"\n{target}: graph {graph:.5f}, {reader.name} {exact:.5f}; of a few {few:.5f}, on the device {kernel:.5f}")
    digit = 10.0 ** (math.floor(math.log10(graph)) - 2)
    assert abs(exact - graph) <= digit / 2, "three significant digits are equal"
    assert math.isfinite(kernel) and kernel != few
