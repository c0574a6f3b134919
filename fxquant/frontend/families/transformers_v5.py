"""transformers 5: `DeepseekV3ForCausalLM` with the experts of a layer in two 3-D parameters."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config, parse_config
from fxquant.frontend import adapters
from fxquant.frontend.families.base import Family, State

ATTENTION = adapters.Attention(
    num_attention_heads="num_heads", kv_lora_rank="kv_lora_rank", qk_nope_head_dim="qk_nope_head_dim",
    qk_rope_head_dim="qk_rope_head_dim", v_head_dim="v_head_dim", softmax_scale="scaling",
)  # fmt: skip
COMMON: dict[str, adapters.Adapter] = {
    "Linear": adapters.Linear(),
    "Embedding": adapters.Embedding(),
    "DeepseekV3RMSNorm": adapters.RMSNorm(eps="variance_epsilon"),
    "DeepseekV3MLP": adapters.MLP(),
    "DeepseekV3Attention": ATTENTION,
}
"""Shared with transformers 4."""


def call_layer(forward: Callable[..., Any], x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """A layer returns its hidden states, alone or first in a tuple."""
    result = forward(x, attention_mask=None, position_embeddings=position_embeddings)
    return result[0] if isinstance(result, tuple) else result


def step(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The model's forward with its DynamicCache."""
    output = model(input_ids=ids, past_key_values=state, use_cache=True)
    return output.logits[:, -1], output.past_key_values


def config_of(model: nn.Module, config: DeepseekV3Config) -> DeepseekV3Config:
    """The model's own config, whatever the checkpoint's says."""
    return parse_config(model.config.to_dict(), type(model).__name__)  # type: ignore[operator,union-attr]


def has_fused_experts(model: nn.Module) -> bool:
    """Whether a layer's experts are one module with `gate_up_proj` and `down_proj`."""
    return any("gate_up_proj" in module._parameters for module in model.modules())


PARTS = {
    "embed_tokens": "model.embed_tokens",
    "layers": "model.layers",
    "norm": "model.norm",
    "lm_head": "lm_head",
}
FAMILY = Family(
    name="transformers 5",
    root="DeepseekV3ForCausalLM",
    recognises=has_fused_experts,
    parts=PARTS,
    layer_children={},
    adapters=COMMON
    | {
        "DeepseekV3MoE": adapters.MoE(
            gate_up_proj="gate_up_proj", down_proj="down_proj", top_k="gate.top_k", n_group="gate.num_group",
            topk_group="gate.topk_group", norm_topk_prob="gate.norm_topk_prob",
            routed_scaling_factor="gate.routed_scaling_factor",
        ),
    },
    attention_input="hidden_states",
    call_layer=call_layer,
    attention_result=lambda x: (x, None),
    step=step,
    config=config_of,
)  # fmt: skip
