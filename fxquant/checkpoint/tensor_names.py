"""Tensor names: other conventions to Hugging Face's, one tensor per expert, `model.layers.3.mlp.experts.0.…`.

Two are supported: the names of DeepSeek's inference code, `layers.3.ffn.experts.0.w1.weight`, and the fused experts of
transformers 5, one tensor per layer. Only headers are read.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch

from fxquant.errors import FxquantError
from fxquant.storage.safetensors import TensorInfo

MODULES: dict[str, tuple[str, int | None]] = {
    "embed_tokens": ("embed", 0),
    "input_layernorm": ("attn_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "q_proj": ("wq", 0),
    "q_a_proj": ("wq_a", None),
    "q_a_layernorm": ("q_norm", None),
    "q_b_proj": ("wq_b", 0),
    "kv_a_proj_with_mqa": ("wkv_a", None),
    "kv_a_layernorm": ("kv_norm", None),
    "kv_b_proj": ("wkv_b", 0),
    "o_proj": ("wo", 1),
    "gate": ("gate", None),
    "gate_proj": ("w1", 0),
    "down_proj": ("w2", 1),
    "up_proj": ("w3", 0),
    "norm": ("norm", None),
    "lm_head": ("head", 0),
}
"""Hugging Face's module → DeepSeek's, and the dimension along which model parallelism splits it."""

CONTAINERS = {
    "layers": "layers",
    "self_attn": "attn",
    "mlp": "ffn",
    "experts": "experts",
    "shared_experts": "shared_experts",
}
"""Hugging Face's segment above a module → DeepSeek's."""

OFFICIAL = {theirs: official for official, (theirs, _) in MODULES.items()} | {
    theirs: official for official, theirs in CONTAINERS.items()
}
PARAMETERS = {"weight": "weight", "scale": "weight_scale_inv", "bias": "bias"}
GATE_PARAMETERS = {"weight": "weight", "bias": "e_score_correction_bias"}
FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""transformers' tensor of all experts → the projections stacked in the rows of each expert."""


def official_tensors(infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a file or an index under official names, sorted. Raises FxquantError for other names.

    If any name begins with `layers.`, all are taken for DeepSeek's. Fused experts are split into byte ranges.
    """
    deepseek = any(name.startswith("layers.") for name in infos)
    official: dict[str, TensorInfo] = {}
    for info in infos.values():
        for tensor in _experts(_renamed(info) if deepseek else info):
            if tensor.name in official:
                raise FxquantError(info.file, f"tensor {tensor.name} is stored both fused and separate.", "Keep one.")
            official[tensor.name] = tensor
    return dict(sorted(official.items()))


def official_name(name: str) -> str | None:
    """`layers.3.attn.wq_a.scale` → `model.layers.3.self_attn.q_a_proj.weight_scale_inv`; None for other conventions."""
    *path, parameter = name.split(".")
    kinds = GATE_PARAMETERS if path[-1:] == ["gate"] else PARAMETERS
    segments = [segment if segment.isdecimal() else OFFICIAL.get(segment) for segment in path]
    if not path or parameter not in kinds or None in segments:
        return None
    official = ".".join([str(segment) for segment in segments] + [kinds[parameter]])
    # lm_head is the only module outside `model`
    return official if path == ["head"] else f"model.{official}"


def split_dimension(name: str) -> int | None:
    """The dimension along which model parallelism splits a tensor of this official name, or None."""
    module = name.split(".")[-2:-1]
    return MODULES[module[0]][1] if module and module[0] in MODULES else None


def is_routed_expert(name: str) -> bool:
    """Whether a tensor of this official name belongs to a routed expert."""
    return "experts" in name.split(".")


def _renamed(info: TensorInfo) -> TensorInfo:
    name = official_name(info.name)
    if name is None:
        fact = f"tensor {info.name} has a name of neither Hugging Face's DeepSeek-V3 nor DeepSeek's inference code."
        raise FxquantError(info.file, fact, "Convert the checkpoint to Hugging Face's names.")
    return replace(info, name=name)


def _experts(info: TensorInfo) -> Iterator[TensorInfo]:
    """[experts, rows, columns] → [rows / projections, columns] per expert and projection; other tensors unchanged."""
    prefix, _, stacked = info.name.rpartition(".")
    if stacked not in FUSED or prefix.rpartition(".")[2] != "experts":
        yield info
        return
    projections = FUSED[stacked]
    if info.dtype is torch.float8_e4m3fn:
        raise FxquantError(info.file, f"{info.name}: fused experts in FP8.", "Save the model with separate experts.")
    if len(info.shape) != 3 or info.shape[1] % len(projections):
        fact = f"{info.name}: {list(info.shape)}, not [experts, {len(projections)} x rows, columns]."
        raise FxquantError(info.file, fact, "Save the model again.")
    experts, rows, columns = info.shape[0], info.shape[1] // len(projections), info.shape[2]
    start, length = info.start, rows * columns * info.dtype.itemsize
    for expert in range(experts):
        for projection in projections:
            name = f"{prefix}.{expert}.{projection}.weight"
            yield TensorInfo(name, info.dtype, (rows, columns), info.file, start, start + length)
            start += length
