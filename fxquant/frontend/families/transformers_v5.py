"""transformers 5.13 and later: `DeepseekV3ForCausalLM` whose experts are two 3-D parameters, and whose gate chooses."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.frontend import adapters
from fxquant.frontend.families.base import Family, State
from fxquant.frontend.own.latent_cache import UpdatedCache
from fxquant.frontend.own.position_mask import additive_mask
from fxquant.frontend.slot import Slot
from fxquant.policy.kinds import Kind

ATTENTION = adapters.Attention(
    num_attention_heads="num_heads", kv_lora_rank="kv_lora_rank", qk_nope_head_dim="qk_nope_head_dim",
    qk_rope_head_dim="qk_rope_head_dim", v_head_dim="v_head_dim", softmax_scale="scaling",
)  # fmt: skip
COMMON: dict[str, adapters.Adapter] = {
    "DeepseekV3RMSNorm": adapters.RMSNorm(eps="variance_epsilon"),
    "DeepseekV3MLP": adapters.MLP(),
    "DeepseekV3Attention": ATTENTION,
}
"""Shared by all releases."""
SILU = ("SiLU", "SiLUActivation")
"""Classes of `ACT2FN["silu"]`."""


MOE = adapters.MoE(
    gate_up_proj="gate_up_proj", down_proj="down_proj", top_k="gate.top_k", n_group="gate.num_group",
    topk_group="gate.topk_group", norm_topk_prob="gate.norm_topk_prob",
    routed_scaling_factor="gate.routed_scaling_factor",
)  # fmt: skip
EXPERTS: dict[str, adapters.Adapter] = dict.fromkeys(("DeepseekV3Experts", "DeepseekV3NaiveMoe"), adapters.Experts(MOE))
"""Their name changed with 5.13, their code did not."""


def call_layer(forward: Callable[..., Any], x: Tensor, rotary: tuple[Tensor, Tensor], past: Tensor) -> Tensor:
    """A layer returns its hidden states, alone or first in a tuple."""
    result = forward(x, attention_mask=None, position_embeddings=rotary)
    return result[0] if isinstance(result, tuple) else result


def step(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The model's forward with its DynamicCache."""
    output = model(input_ids=ids, past_key_values=state, use_cache=True)
    return output.logits[:, -1], output.past_key_values


def call_root(
    forward: Callable[..., Any], ids: Tensor, positions: Tensor, start: int, table: tuple[Tensor, Tensor]
) -> Tensor:
    """The root's forward without a cache or mask of its own, which its layers do not read."""
    return forward(input_ids=ids, position_ids=positions, use_cache=False).logits


def rotary(model: nn.Module, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """What its rotary module gives for these positions, the first half of each row."""
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions[None])  # type: ignore[union-attr,operator]
    yield cos[0].chunk(2, -1)[0], sin[0].chunk(2, -1)[0]


def config_of(model: nn.Module, config: DeepseekV3Config) -> DeepseekV3Config:
    """The model's own config, whatever the checkpoint's says."""
    return parse_config(model.config.to_dict(), type(model).__name__)  # type: ignore[operator,union-attr]


def own_attention(attention: nn.Module, forward: Callable[..., Any], slot: Slot, x: Tensor) -> Any:
    """Where its Cache holds latents, as from 5.2x on, in the eager form."""
    cache = UpdatedCache(slot.past)
    mask = additive_mask(slot.attention_mask, x.shape[1], x.dtype).unsqueeze(1)
    given = "cache" if _takes(attention, "cache") else "past_key_values"
    config, chosen = attention.config, attention.config._attn_implementation  # type: ignore[union-attr]
    config._attn_implementation = "eager"  # type: ignore[union-attr]
    try:
        result = forward(x, position_embeddings=(slot.cos, slot.sin), attention_mask=mask, **{given: cache})
    finally:
        config._attn_implementation = chosen  # type: ignore[union-attr]
    slot.present = cache.present
    return result


def _takes(attention: nn.Module, name: str) -> bool:
    """Whether its forward, or that of a base, which it may hand its arguments on to, has a parameter of this name."""
    forwards = [vars(cls)["forward"] for cls in type(attention).__mro__ if "forward" in vars(cls)]
    return any(name in inspect.signature(inspect.unwrap(forward)).parameters for forward in forwards)


def is_silu(activation: Any) -> bool:
    """Whether `activation` is torch's SiLU or transformers' own."""
    cls = type(activation)
    return cls.__name__ in SILU and cls.__module__.split(".")[0] in ("torch", "transformers")


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a layer's experts are one module with `gate_up_proj` and `down_proj`."""
    return any("gate_up_proj" in module._parameters for module in model.modules())


def gate_chooses(model: nn.Module) -> bool:
    """Whether the gate, which holds the correction bias, is what knows how many experts to choose."""
    return any("e_score_correction_bias" in gate._buffers and hasattr(gate, "top_k") for gate in model.modules())


REQUIRES: dict[str, dict[str, Any]] = {
    "DeepseekV3MLP": {"act_fn": is_silu},
    "DeepseekV3MoE": {"experts.act_fn": is_silu},
    "DeepseekV3Experts": {"act_fn": is_silu},
    "DeepseekV3NaiveMoe": {"act_fn": is_silu},
    "DeepseekV3Attention": {"config.rope_interleave": True},
}
PARTS = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
FAMILY = Family(
    name="transformers 5.13",
    root="DeepseekV3ForCausalLM",
    recognises=lambda model: has_fused_experts(model) and gate_chooses(model),
    parts=PARTS,
    layer_children={},
    adapters=COMMON | EXPERTS | {"DeepseekV3MoE": MOE},
    attention_input="hidden_states",
    call_layer=call_layer,
    attention_result=lambda x: (x, None),
    step=step,
    config=config_of,
    decoder="model",
    call_root=call_root,
    versions="transformers",
    kinds={
        "DeepseekV3Attention": Kind.ATTENTION, "DeepseekV3MLP": Kind.DENSE_MLP, "DeepseekV3MoE": Kind.ROUTED_EXPERT,
        "DeepseekV3TopkRouter": Kind.GATE, "DeepseekV3RMSNorm": Kind.NORM,
    },
    parameters={},
    requires=REQUIRES,
    rotary=rotary,
    prepare=lambda model, config: None,
    flat_gate=True,
    own_attention=own_attention,
)  # fmt: skip
