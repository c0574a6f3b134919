"""Every shape of the family compiles for every target, and is verified."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import calibrated_once
from neighbours import NEIGHBOURS
from safetensors.torch import save_file
from tiny import YARN

import fxquant
from fxquant import CompileOptions
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.engines.table import Target

__all__ = ["calibrated_once"]
SOURCES = {
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "fp8 with MTP": {"fp8": True, "num_nextn_predict_layers": 1, "shards": 3},
    "q_lora_rank null": {"q_lora_rank": None},
    "no dense layers": {"first_k_dense_replace": 0},
    "all dense layers but one": {"num_hidden_layers": 3, "first_k_dense_replace": 2},
    "no shared experts": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
    "attention bias": {"attention_bias": True},
    "yarn": {"rope_scaling": YARN},
    "weights not normalized": {"norm_topk_prob": False},
    "one expert group": {"n_group": 1, "topk_group": 1},
    **NEIGHBOURS,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", [Target.ASCEND, Target.ONNX])
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_compiles_and_verifies(name: str, target: Target, tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    ids = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(1))
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    options = CompileOptions(target=target, out=tmp_path / "out", calib=tmp_path / "ids.safetensors")
    report = fxquant.compile(tiny_folder(**SOURCES[name]), options)
    assert report.verification is not None
    assert report.verification.verdict == "verified"


@pytest.mark.slow
@pytest.mark.parametrize("profile", OnnxProfile)
@pytest.mark.parametrize("source", [{"dtype": torch.float16}, {"fp8": True}], ids=["float16", "fp8"])
def test_halves_and_block_scales_verify_in_every_onnx_profile(
    source: dict[str, Any], profile: OnnxProfile, tmp_path: Path, tiny_folder: Callable[..., Path]
) -> None:
    save_file({"ids": torch.arange(3, 99).view(4, 24)}, tmp_path / "ids.safetensors")
    options = CompileOptions(
        target=Target.ONNX, onnx_profile=profile, out=tmp_path / "out", calib=tmp_path / "ids.safetensors"
    )
    verification = fxquant.compile(tiny_folder(**source), options).verification
    assert verification is not None and verification.verdict == "verified"
    assert verification.end_to_end is not None


def test_sharded_output_verifies(tmp_path: Path, tiny_folder: Callable[..., Path]) -> None:
    options = CompileOptions(policy="deepseek_w4a8_dynamic", out=tmp_path / "out", max_shard_size=200_000)
    report = fxquant.compile(tiny_folder(), options)
    names = sorted(path.name for path in report.out.glob("quant_model_weight*"))
    count = len(names) - 1
    assert count > 3
    assert names[0] == f"quant_model_weight_w8a8-00001-of-{count:05d}.safetensors"
    assert names[-1] == "quant_model_weight_w8a8.safetensors.index.json"
    assert report.verification is not None
    assert report.verification.verdict == "verified"
