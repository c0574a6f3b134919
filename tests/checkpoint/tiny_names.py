"""Checkpoints in other conventions, written from a Hugging Face folder name by name, without fxquant's tables."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_config
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.weights import tensor_bytes

SPLITTABLE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 512, "num_attention_heads": 16,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "num_nextn_predict_layers": 0,
}  # fmt: skip
"""What is split over four files has four FP8 blocks or a multiple of them."""

ARGS: dict[str, Any] = {
    "vocab_size": 128, "dim": 256, "inter_dim": 512, "moe_inter_dim": 512, "n_layers": 2, "n_dense_layers": 1,
    "n_heads": 16, "n_routed_experts": 8, "n_shared_experts": 1, "n_activated_experts": 2, "n_expert_groups": 4,
    "n_limited_groups": 2, "score_func": "sigmoid", "route_scale": 2.5, "q_lora_rank": 64, "kv_lora_rank": 32,
    "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "max_seq_len": 1024,
}  # fmt: skip
"""The ModelArgs of SPLITTABLE."""

TOP = [
    ("model.embed_tokens.weight", "embed.weight", 0),
    ("model.norm.weight", "norm.weight", None),
    ("lm_head.weight", "head.weight", 0),
]
LAYER = [
    ("input_layernorm.weight", "attn_norm.weight", None),
    ("post_attention_layernorm.weight", "ffn_norm.weight", None),
    ("self_attn.q_a_layernorm.weight", "attn.q_norm.weight", None),
    ("self_attn.kv_a_layernorm.weight", "attn.kv_norm.weight", None),
    ("mlp.gate.weight", "ffn.gate.weight", None),
    ("mlp.gate.e_score_correction_bias", "ffn.gate.bias", None),
    ("self_attn.q_a_proj.bias", "attn.wq_a.bias", None),
    ("self_attn.kv_a_proj_with_mqa.bias", "attn.wkv_a.bias", None),
    ("self_attn.o_proj.bias", "attn.wo.bias", 1),
]
LINEARS = [
    ("self_attn.q_proj", "attn.wq", 0),
    ("self_attn.q_a_proj", "attn.wq_a", None),
    ("self_attn.q_b_proj", "attn.wq_b", 0),
    ("self_attn.kv_a_proj_with_mqa", "attn.wkv_a", None),
    ("self_attn.kv_b_proj", "attn.wkv_b", 0),
    ("self_attn.o_proj", "attn.wo", 1),
    *[
        (f"mlp.{part}{official}", f"ffn.{part}{theirs}", dim)
        for part in ("", "shared_experts.", *(f"experts.{expert}." for expert in range(8)))
        for official, theirs, dim in [("gate_proj", "w1", 0), ("down_proj", "w2", 1), ("up_proj", "w3", 0)]
    ],
]


def name_pairs(layers: int = 2) -> Iterator[tuple[str, str, int | None]]:
    """(official name, DeepSeek's, split dimension) of every tensor that a tiny checkpoint may have."""
    yield from TOP
    for layer in range(layers):
        linears = [(f"{ours}.weight", f"{theirs}.weight", dim) for ours, theirs, dim in LINEARS]
        scales = [(f"{ours}.weight_scale_inv", f"{theirs}.scale", dim) for ours, theirs, dim in LINEARS]
        for official, theirs, dim in [*LAYER, *linears, *scales]:
            yield f"model.layers.{layer}.{official}", f"layers.{layer}.{theirs}", dim


def folder_of(path: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    """A checkpoint of these tensors."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(tiny_config(**config)))
    save_file(tensors, path / "model.safetensors")
    return path


def write_parts(folder: Path, source: Path, count: int, args: dict[str, Any] | None = None) -> Path:
    """The one-file Hugging Face checkpoint `source` as DeepSeek's convert.py splits it; `args` for another config."""
    tensors, folder = load_file(source / "model.safetensors"), folder / f"mp{count}"
    pairs = {official: (theirs, dim) for official, theirs, dim in name_pairs()}
    folder.mkdir(parents=True)
    for part in range(count):
        held = {}
        for official, tensor in tensors.items():
            theirs, dim = pairs[official]
            if ".experts." in theirs:
                if int(theirs.split(".")[4]) * count // 8 == part:
                    held[theirs] = tensor
            elif dim is None or tensor.ndim <= dim:
                held[theirs] = tensor
            else:
                size = tensor.shape[dim] // count
                assert size * count == tensor.shape[dim], (official, tensor.shape)
                held[theirs] = tensor.narrow(dim, part * size, size).contiguous()
        save_file(held, folder / f"model{part}-mp{count}.safetensors")
    if args is None:
        shutil.copy(source / "config.json", folder)
    else:
        (folder / "config.json").write_text(json.dumps(args))
    return folder


def fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official tensors → those that transformers 5 has in memory, the eight experts of a layer stacked."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in sorted({name.split(".experts.")[0] for name in tensors if ".experts." in name}):
        experts = [
            {part: tensors[f"{layer}.experts.{index}.{part}_proj.weight"] for part in ("gate", "up", "down")}
            for index in range(8)
        ]
        pairs = [torch.cat([expert["gate"], expert["up"]]) for expert in experts]
        fused[f"{layer}.experts.gate_up_proj"] = torch.stack(pairs)
        fused[f"{layer}.experts.down_proj"] = torch.stack([expert["down"] for expert in experts])
    return fused


def edit(file: Path, **changes: Tensor | None) -> None:
    """Set or, with None, remove tensors of a safetensors file."""
    tensors = {**load_file(file), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)


def assert_same(checkpoint: Checkpoint, expected: Checkpoint) -> None:
    """Names, dtypes, shapes, bytes and everything that is read."""
    assert list(checkpoint.tensors) == list(expected.tensors) and list(checkpoint.scales) == list(expected.scales)
    assert (checkpoint.nbytes, checkpoint.block, checkpoint.dtype) == (expected.nbytes, expected.block, expected.dtype)
    for name, info in (*expected.tensors.items(), *expected.scales.items()):
        other = checkpoint.scales[name] if info is expected.scales.get(name) else checkpoint.tensors[name]
        assert (other.name, other.dtype, other.shape) == (info.name, info.dtype, info.shape)
        assert other.nbytes == info.nbytes and other.file.parent == checkpoint.folder
        assert other.read_bytes(0, other.nbytes) == info.read_bytes(0, info.nbytes) == tensor_bytes(other.read())
    for name in expected.tensors:
        assert checkpoint.stored_dtype(name) is expected.stored_dtype(name)
        assert torch.equal(checkpoint.read(name), expected.read(name))
