"""Which tensors a DeepSeek-V3 checkpoint of some config has, and their shapes."""

from fxquant.checkpoint.config import DeepseekV3Config

BIAS = "e_score_correction_bias"


def tensor_shapes(config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of an official checkpoint of this shape."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    return shapes


def _layer_shapes(config: DeepseekV3Config, layer: int) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes |= {f"self_attn.{name}": shape for name, shape in _attention_shapes(config).items()}
    if layer < config.first_k_dense_replace:
        return shapes | _mlp_shapes("mlp", hidden, config.intermediate_size)
    shapes |= {"mlp.gate.weight": (config.n_routed_experts, hidden), f"mlp.gate.{BIAS}": (config.n_routed_experts,)}
    for expert in range(config.n_routed_experts):
        shapes |= _mlp_shapes(f"mlp.experts.{expert}", hidden, width)
    if config.n_shared_experts:
        shapes |= _mlp_shapes("mlp.shared_experts", hidden, width * config.n_shared_experts)
    if layer >= config.num_hidden_layers:
        shapes |= {"eh_proj.weight": (hidden, 2 * hidden), "enorm.weight": (hidden,), "hnorm.weight": (hidden,)}
        vocabulary = (config.vocab_size, hidden)
        shapes |= {"embed_tokens.weight": vocabulary, "shared_head.head.weight": vocabulary}
        shapes |= {"shared_head.norm.weight": (hidden,)}
    return shapes


def _attention_shapes(config: DeepseekV3Config) -> dict[str, tuple[int, ...]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    latent = config.kv_lora_rank + config.qk_rope_head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "kv_a_proj_with_mqa.weight": (latent, hidden),
        "kv_a_layernorm.weight": (config.kv_lora_rank,),
        "kv_b_proj.weight": (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        "o_proj.weight": (hidden, heads * config.v_head_dim),
    }
    if rank is None:
        shapes["q_proj.weight"] = (heads * config.qk_head_dim, hidden)
    else:
        shapes |= {"q_a_proj.weight": (rank, hidden), "q_a_layernorm.weight": (rank,)}
        shapes["q_b_proj.weight"] = (heads * config.qk_head_dim, rank)
    if config.attention_bias:
        biased = ["kv_a_proj_with_mqa", "o_proj", *(["q_a_proj"] if rank else [])]
        shapes |= {f"{name}.bias": shapes[f"{name}.weight"][:1] for name in biased}
    return shapes


def _mlp_shapes(prefix: str, hidden: int, width: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (width, hidden),
        f"{prefix}.up_proj.weight": (width, hidden),
        f"{prefix}.down_proj.weight": (hidden, width),
    }
