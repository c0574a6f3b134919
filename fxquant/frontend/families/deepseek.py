"""DeepSeek's own inference code: `Transformer` of `Block`s, attention naive or absorbed, linears in bf16 or FP8."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend import adapters
from fxquant.frontend.families.base import Family, State
from fxquant.frontend.own.latent_cache import BufferCache
from fxquant.frontend.own.position_mask import PositionMask, additive_mask
from fxquant.frontend.own.rotary_pairs import Table, rows
from fxquant.frontend.recognition.published import version_of
from fxquant.frontend.slot import Slot
from fxquant.policy.kinds import Kind

CACHES = ("kv_cache", "pe_cache", "k_cache", "v_cache")


def call_layer(forward: Callable[..., Any], x: Tensor, rotary: tuple[Tensor, Tensor], past: Tensor) -> Tensor:
    """A block takes (x, start_pos, freqs_cis, mask), of which only its attention reads the last two."""
    return forward(x, past.shape[1], None, None)


def step(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The model's forward at `start_pos`; it keeps its cache in buffers and returns the last position, or all."""
    start = state or 0
    logits = model(ids, start)
    return logits[:, -1] if logits.dim() == 3 else logits, start + ids.shape[1]


def call_root(
    forward: Callable[..., Any], ids: Tensor, positions: Tensor, start: int, table: tuple[Tensor, Tensor]
) -> Tensor:
    """The root's forward with a table of rotations that has the new positions' rows."""
    model = forward.__self__  # type: ignore[attr-defined]
    buffers = dict(model._buffers)
    model._buffers.clear()
    vars(model)["freqs_cis"] = Table(rows(*table))
    try:
        return forward(ids, start)
    finally:
        del vars(model)["freqs_cis"]
        model._buffers.update(buffers)


def own_attention(attention: nn.Module, forward: Callable[..., Any], slot: Slot, x: Tensor) -> Tensor:
    """The absorbed form, whose cache is latents: its buffers are stood for, `start_pos` is the length of the past."""
    start, widths = slot.past.shape[1], [attention.kv_lora_rank, attention.qk_rope_head_dim]
    latents, k_rope = (BufferCache(part) for part in slot.past.split(widths, -1))
    buffers = dict(attention._buffers)
    if not {"kv_cache", "pe_cache"} <= buffers.keys():
        raise ValueError("it has no buffers kv_cache and pe_cache for latents: only the absorbed form can be traced")
    attention._buffers.clear()
    vars(attention).update(kv_cache=latents, pe_cache=k_rope)
    try:
        mask = PositionMask(additive_mask(slot.attention_mask, x.shape[1], x.dtype))
        result = forward(x, start, rows(slot.cos, slot.sin), mask)
    finally:
        del attention.kv_cache, attention.pe_cache
        attention._buffers.update(buffers)
    slot.present = torch.cat((latents.grown(), k_rope.grown()), -1)
    return result


def recognises(model: nn.Module) -> bool:
    """By its parts, and a forward of ids and the position they start at."""
    parts = all(name in model._modules for name in ("embed", "layers", "norm", "head"))
    return parts and "start_pos" in inspect.signature(inspect.unwrap(type(model).forward)).parameters


def rotary(model: nn.Module, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of its complex table, as many as it has."""
    table = cast("Tensor", model.freqs_cis)
    held = table[positions[positions < len(table)]]
    yield held.real, held.imag


def prepare(model: nn.Module, config: DeepseekV3Config) -> None:
    """Give each published gate the correction bias that every DeepSeek-V3 has; the file makes it at width 7168 only.

    Raises FxquantError for a cache of a dtype of its own: that of the graph is the model's.
    """
    for attention in model.modules():
        _check_caches(attention, str(config.model_dump().get("torch_dtype")))
    for gate in model.modules():
        if getattr(gate, "bias", 0) is None and getattr(version_of(gate, "deepseek"), "name", "") == "Gate":
            weight = cast("Tensor", gate.weight)
            bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
            vars(gate).pop("bias", None)
            gate.register_parameter("bias", nn.Parameter(bias, requires_grad=False))


def _check_caches(attention: nn.Module, stored: str) -> None:
    floats = {tensor.dtype for tensor in attention.parameters() if tensor.element_size() > 1}
    for name in CACHES:
        cache = attention._buffers.get(name)
        if cache is not None and cache.dtype not in floats and str(cache.dtype).removeprefix("torch.") != stored:
            fact = f"its {name} is {cache.dtype}, its weights {', '.join(sorted(map(str, floats)))}."
            way_out = "The graph keeps latents in the dtype of the model: leave out the dtype, or give it the model's."
            raise FxquantError(type(attention).__name__, fact, way_out)


LINEAR_NAMES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
FAMILY = Family(
    name="DeepSeek's inference code",
    root="",
    recognises=recognises,
    parts={"embed_tokens": "embed", "layers": "layers", "norm": "norm", "lm_head": "head"},
    layer_children={
        "attn": "self_attn", "ffn": "mlp", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    },
    adapters={
        "Linear": adapters.Linear(),
        "ColumnParallelLinear": adapters.Linear(),
        "RowParallelLinear": adapters.Linear(),
        "Embedding": adapters.Embedding(),
        "ParallelEmbedding": adapters.Embedding(),
        "RMSNorm": adapters.RMSNorm(),
        "MLP": adapters.MLP(gate_proj="w1", up_proj="w3", down_proj="w2"),
        "Expert": adapters.MLP(gate_proj="w1", up_proj="w3", down_proj="w2"),
        "MLA": adapters.Attention(
            q_proj="wq", q_a_proj="wq_a", q_a_layernorm="q_norm", q_b_proj="wq_b", kv_a_proj_with_mqa="wkv_a",
            kv_a_layernorm="kv_norm", kv_b_proj="wkv_b", o_proj="wo", num_attention_heads="n_heads",
            kv_lora_rank="kv_lora_rank", qk_nope_head_dim="qk_nope_head_dim", qk_rope_head_dim="qk_rope_head_dim",
            v_head_dim="v_head_dim", softmax_scale="softmax_scale",
        ),
        "MoE": adapters.MoE(
            correction_bias="gate.bias", gate_proj="w1.weight", up_proj="w3.weight", down_proj="w2.weight",
            top_k="gate.topk", n_group="gate.n_groups", topk_group="gate.topk_groups",
            routed_scaling_factor="gate.route_scale", norm_topk_prob=True,
        ),
    },
    attention_input="x",
    call_layer=call_layer,
    attention_result=lambda x: x,
    step=step,
    config=lambda model, config: config,
    decoder="",
    call_root=call_root,
    versions="deepseek",
    kinds={
        "MLA": Kind.ATTENTION, "MLP": Kind.DENSE_MLP, "Expert": Kind.ROUTED_EXPERT, "MoE": Kind.ROUTED_EXPERT,
        "Gate": Kind.GATE, "RMSNorm": Kind.NORM, "ParallelEmbedding": Kind.EMBEDDING,
    },
    parameters={
        "MLA": {
            "wq": "q_proj", "wq_a": "q_a_proj", "q_norm": "q_a_layernorm", "wq_b": "q_b_proj",
            "wkv_a": "kv_a_proj_with_mqa", "kv_norm": "kv_a_layernorm", "wkv_b": "kv_b_proj", "wo": "o_proj",
        },
        "MLP": LINEAR_NAMES,
        "Expert": LINEAR_NAMES,
        "Gate": {"bias": "e_score_correction_bias"},
    },
    requires={"Gate": {"score_func": "sigmoid"}, "MoE": {"experts_start_idx": 0}},
    rotary=rotary,
    prepare=prepare,
    flat_gate=True,
    own_attention=own_attention,
)  # fmt: skip
