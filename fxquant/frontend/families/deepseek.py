"""DeepSeek's own inference code: `Transformer` of `Block`s, attention naive or absorbed, linears in bf16 or FP8."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fxquant.frontend import adapters
from fxquant.frontend.families.base import Family, State


def call_layer(forward: Callable[..., Any], x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """A block takes (x, start_pos, freqs_cis, mask), of which only its attention reads the last three."""
    return forward(x, 0, None, None)


def step(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The model's forward at `start_pos`; it keeps its cache in buffers and returns only the last position."""
    start = state or 0
    return model(ids, start), start + ids.shape[1]


FAMILY = Family(
    name="DeepSeek's inference code",
    root="Transformer",
    recognises=lambda model: all(name in model._modules for name in ("embed", "layers", "norm", "head")),
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
)  # fmt: skip
