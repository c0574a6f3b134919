"""Checkpoints of real dimensions with random weights, made fast: what the benchmarks of whole compiles read."""

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.checkpoint.model_parallel_parts import SourceTensor
from fxquant.models import DeepseekV3
from fxquant.planning.config_checkpoint import config_checkpoint
from fxquant.storage.safetensors import build_header
from fxquant.tracing import trace

FP8 = {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
POOL = 1 << 26
"""Random numbers that all tensors are cut from, each from another place."""
STEP = 7_919_357


def config(layers: int, experts: int, **changes: Any) -> dict[str, Any]:
    """The published 671B configuration, in FP8, with so many expert layers of so many experts, and no others."""
    published = json.loads((resources.files("fxquant") / "models/deepseek_v3_671b.json").read_text(encoding="utf-8"))
    groups = 8 if experts % 8 == 0 else 1
    sizes = {"num_hidden_layers": layers, "n_routed_experts": experts, "n_group": groups, "topk_group": min(4, groups)}
    return published | sizes | {"first_k_dense_replace": 0, "num_nextn_predict_layers": 0} | FP8 | changes


def tensors_of(document: dict[str, Any]) -> dict[str, SourceTensor]:
    """Every tensor of the official FP8 checkpoint with this config.json, block scales included."""
    parsed = parse_config(document, "config.json")
    described = Checkpoint(Path("config.json"), document, {})
    with torch.device("meta"):
        program = trace(DeepseekV3(parsed), described)
    checkpoint = config_checkpoint(described, program, parsed)
    return {**checkpoint.tensors, **{f"{name}_scale_inv": scale for name, scale in checkpoint.scales.items()}}


def source_bytes(document: dict[str, Any]) -> int:
    """Of all tensors."""
    return sum(tensor.nbytes for tensor in tensors_of(document).values())


def write_model(folder: Path, document: dict[str, Any]) -> int:
    """Write config.json and one file of weights; the bytes of all tensors."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    tensors = sorted(tensors_of(document).items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header, _ = build_header([(name, tensor.dtype, tensor.shape) for name, tensor in tensors])
    pools = _pools()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        for index, (_, tensor) in enumerate(tensors):
            for piece in _cut(pools[tensor.dtype], index * STEP * 64, tensor.nbytes):
                file.write(piece)
    return sum(tensor.nbytes for _, tensor in tensors)


def _pools() -> dict[torch.dtype, memoryview]:
    """Normal numbers; float32 ones are block scales, and positive."""
    normal = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    tensors = {
        torch.float8_e4m3fn: (normal * 112).clamp(-448, 448).to(torch.float8_e4m3fn),
        torch.bfloat16: (normal[: POOL // 2] * 0.02).bfloat16(),
        torch.float32: (normal[: POOL // 4].abs() + 0.5) * 2e-4,
    }
    return {dtype: memoryview(tensor.view(torch.uint8).numpy()) for dtype, tensor in tensors.items()}


def _cut(pool: memoryview, start: int, length: int) -> Iterator[memoryview]:
    """`length` bytes of the pool from `start` on, round and round."""
    while length:
        start %= len(pool)
        piece = pool[start : start + length]
        yield piece
        start, length = start + len(piece), length - len(piece)
