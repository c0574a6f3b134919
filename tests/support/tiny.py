"""Random tiny DeepSeek-V3 checkpoints from a fixed seed, and ways to load them."""

import copy
import json
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_shapes import BIAS, tensor_shapes
from torch import Tensor, fx, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.compilation.ledger import mtp_modules
from fxquant.models import DecoderLayer, DeepseekV3
from fxquant.models.layers import RoutedExperts
from fxquant.passes import AssignSchemes, Calibrate, pipeline, run_passes
from fxquant.policy.policy import load_policy
from fxquant.program.program import Program
from fxquant.tracing import trace

ABSENT = object()
"""A config change that removes the key."""

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max
BLOCK = 128
LINEARS = ("_proj.weight", "_proj_with_mqa.weight")
"""Ends of the names that official FP8 checkpoints quantize: not the gate, embedding, head, norms and eh_proj."""

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 1024,
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
}
FEW_MODULES: dict[str, Any] = {
    "intermediate_size": 64, "n_routed_experts": 2, "n_group": 1, "topk_group": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2,
}  # fmt: skip
"""Changes that leave a model with few and small modules."""

YARN = {
    "type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 32,
}


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json of one dense and one MoE layer, with `changes`."""
    return {key: value for key, value in {**CONFIG, **changes}.items() if value is not ABSENT}


def write_checkpoint(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, fp8: bool = False, shards: int = 1, seed: int = 0,
    **changes: Any,
) -> Path:  # fmt: skip
    """Write config.json and random weights: one file, or `shards` files and their index.

    `changes` go to the config; num_nextn_predict_layers=1 adds the tensors of a multi-token-prediction layer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(torch_dtype=str(dtype).removeprefix("torch."), **changes)
    if fp8:
        config["quantization_config"] = {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
        }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_shards(folder, stored_tensors(random_tensors(config, seed), dtype, fp8), shards)
    return folder


def write_shards(folder: Path, tensors: dict[str, Tensor], shards: int = 1) -> None:
    """`tensors` as model.safetensors, or dealt out over `shards` files with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = sorted(tensors)
    files = {f"model-{shard + 1:05}-of-{shards:05}.safetensors": names[shard::shards] for shard in range(shards)}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def random_tensors(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """Official name → float32 values that keep activations around one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(parse_config(config, "tiny")).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            values = 1 + values / 10
        elif len(shape) == 1:
            values = values / 10
        elif "embed_tokens" not in name:
            values = values / math.sqrt(shape[1])
        tensors[name] = values
    return tensors


def stored_tensors(tensors: dict[str, Tensor], dtype: torch.dtype, fp8: bool) -> dict[str, Tensor]:
    """What is on disk: everything in `dtype`, the correction bias in float32, linears as FP8 blocks if `fp8`."""
    stored = {}
    for name, values in tensors.items():
        if fp8 and name.endswith(LINEARS) and "eh_proj" not in name:
            stored[name], stored[f"{name}_scale_inv"] = encode_fp8(values)
        else:
            stored[name] = values if name.endswith(BIAS) else values.to(dtype)
    return stored


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, k] → float8_e4m3fn [n, k], float32 block scales [ceil(n / 128), ceil(k / 128)]."""
    blocks = [row.split(BLOCK, 1) for row in weight.split(BLOCK)]
    scales = torch.stack([torch.stack([block.abs().max() / FP8_MAX for block in row]) for row in blocks])
    wide = scales.repeat_interleave(BLOCK, 0)[: len(weight)].repeat_interleave(BLOCK, 1)[:, : weight.shape[1]]
    return (weight / wide).to(torch.float8_e4m3fn), scales


def meta_model(checkpoint: Checkpoint, layer: type[DecoderLayer] = DecoderLayer) -> DeepseekV3:
    """The checkpoint's model without weights."""
    with torch.device("meta"):
        return DeepseekV3(parse_config(checkpoint.config, checkpoint.folder), layer)


def load_weights(model: DeepseekV3, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> DeepseekV3:
    """`model`, built on meta, with its weights in memory as `dtype`; the correction bias stays float32."""
    for path, _ in list(model.named_parameters()):
        prefix, _, name = path.rpartition(".")
        owner = model.get_submodule(prefix)
        names = owner.checkpoint_names(prefix, name) if isinstance(owner, RoutedExperts) else (path,)
        tensor = _read(checkpoint, names, isinstance(owner, RoutedExperts), dtype)
        setattr(owner, name, nn.Parameter(tensor, requires_grad=False))
    return model


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, layer: type[DecoderLayer] = DecoderLayer
) -> DeepseekV3:
    """The checkpoint's model with its weights."""
    return load_weights(meta_model(checkpoint, layer), checkpoint, dtype)


def load_graph(program: Program, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> fx.GraphModule:
    """A copy of the program's float graph with its weights."""
    root = nn.Module()
    for target, parameter in program.parameters.items():
        _attach(root, target, _read(checkpoint, parameter.names, parameter.stacked, dtype))
    return fx.GraphModule(root, copy.deepcopy(program.graph.graph))


def _attach(root: nn.Module, target: str, tensor: Tensor) -> None:
    """Make `root.<target>` a buffer, creating the modules on the way."""
    *path, name = target.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    root.register_buffer(name, tensor)


def _read(checkpoint: Checkpoint, names: Iterable[str], stacked: bool, dtype: torch.dtype) -> Tensor:
    tensors = [checkpoint.read(name) if name.endswith(BIAS) else checkpoint.read(name).to(dtype) for name in names]
    return torch.stack(tensors) if stacked else tensors[0]


def random_ids(model: DeepseekV3, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids int64 [batch, length]."""
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def inputs(
    model: DeepseekV3, ids: Tensor, past: list[Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Arguments of the model for unpadded `ids` that follow `past`."""
    dtype = model.model.embed_tokens.weight.dtype
    past = past if past is not None else model.empty_cache(len(ids), dtype)
    start, total = past[0].shape[1], past[0].shape[1] + ids.shape[1]
    positions = torch.arange(start, total).expand(ids.shape)
    return ids, torch.ones(len(ids), total, dtype=torch.int64), positions, past


def greedy(model: DeepseekV3, ids: Tensor, steps: int) -> Tensor:
    """The `steps` likeliest next tokens after each row of `ids`, by cached decode: int64 [batch, steps]."""
    logits, past = model(*inputs(model, ids))
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < steps:
        logits, past = model(*inputs(model, tokens[-1], past))
        tokens.append(logits[:, -1:].argmax(-1))
    return torch.cat(tokens, 1)


def float_program(checkpoint: Checkpoint, layer: type[DecoderLayer] = DecoderLayer) -> Program:
    """A fresh copy of the checkpoint's traced graph, which depends on nothing but its config."""
    return copy.deepcopy(_traced(json.dumps(checkpoint.config), layer))


@lru_cache(256)
def _traced(config: str, layer: type[DecoderLayer]) -> Program:
    checkpoint = Checkpoint(Path("tiny"), json.loads(config), {})
    return trace(meta_model(checkpoint, layer), checkpoint)


def rewritten(checkpoint: Checkpoint, policy: str | Path) -> Program:
    """A fresh copy of the checkpoint's graph after the whole pipeline, calibrated on 2 x 16 random tokens."""
    key = (checkpoint.folder, json.dumps(checkpoint.config), str(policy))
    if key not in _REWRITTEN:
        program, loaded, model = float_program(checkpoint), load_policy(str(policy)), meta_model(checkpoint)
        batches = [random_ids(model, 1, 16, seed) for seed in (1, 2)]
        assign = AssignSchemes(loaded, mtp_modules(checkpoint, model.mtp_modules()))
        run_passes(program, pipeline(assign, Calibrate(loaded, checkpoint, lambda: batches)))
        _REWRITTEN[key] = program
    return copy.deepcopy(_REWRITTEN[key])


_REWRITTEN: dict[tuple[Path, str, str], Program] = {}


def float32_bound(model: DeepseekV3, logits: Tensor) -> float:
    """Every one of the two blocks a layer sums `hidden` products, whose rounding errors of 2**-24 add up like a random
    walk, differently in the two implementations."""
    config = model.config
    return 2 * 2 * config.num_hidden_layers * config.hidden_size**0.5 * 2.0**-24 * float(logits.abs().max())
