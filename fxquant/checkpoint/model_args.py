"""ModelArgs of DeepSeek's inference code: a config.json in its keys, converted to Hugging Face's keys."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fxquant.checkpoint.config_sizes import (
    DenseLayers,
    Experts,
    Heads,
    Layers,
    Positions,
    RopeTheta,
    RouteScale,
    SharedExperts,
    Size,
    YarnBeta,
    YarnScale,
)  # fmt: skip
from fxquant.errors import FxquantError
from fxquant.inputs.limits import WIDTH
from fxquant.inputs.validation import validation_fact


class ModelArgs(BaseModel):
    """The published dataclass with its defaults; as there, an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    max_batch_size: int = 8
    max_seq_len: Positions = 16384
    dtype: Literal["bf16", "fp8"] = "bf16"
    scale_fmt: str | None = None
    vocab_size: Size = 102400
    dim: Size = 2048
    inter_dim: Size = 10944
    moe_inter_dim: Size = 1408
    n_layers: Layers = 27
    n_dense_layers: DenseLayers = 1
    n_heads: Heads = 16
    n_routed_experts: Experts = 64
    n_shared_experts: SharedExperts = 2
    n_activated_experts: Experts = 6
    n_expert_groups: Experts = 1
    n_limited_groups: Experts = 1
    # the published default is DeepSeek-V2's, which is refused
    score_func: Literal["sigmoid"] = Field(default="softmax", validate_default=True)
    route_scale: RouteScale = 1.0
    q_lora_rank: int = Field(default=0, ge=0, le=WIDTH)
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = Field(default=64, multiple_of=2)
    v_head_dim: Size = 128
    original_seq_len: Positions = 4096
    rope_theta: RopeTheta = 10000.0
    rope_factor: Annotated[float, Field(ge=1, le=1e6)] = 40.0
    beta_fast: YarnBeta = 32
    beta_slow: YarnBeta = 1
    mscale: YarnScale = 1.0


SPARSE_ATTENTION = "attention is sparse, chosen by an indexer that DeepSeek-V3 lacks"
MODELS = "DeepSeek-V3 and R1"
NEWER = {
    **dict.fromkeys(("index_n_heads", "index_head_dim", "index_topk"), SPARSE_ATTENTION),
    **dict.fromkeys(("window_size", "compress_ratios"), "attention is compressed and windowed, as in DeepSeek-V4"),
}
"""Key of a later ModelArgs → what that model does."""

KEYS = {
    "max_seq_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "dim": "hidden_size",
    "inter_dim": "intermediate_size",
    "moe_inter_dim": "moe_intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_dense_layers": "first_k_dense_replace",
    "n_heads": "num_attention_heads",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "n_activated_experts": "num_experts_per_tok",
    "n_expert_groups": "n_group",
    "n_limited_groups": "topk_group",
    "score_func": "scoring_func",
    "route_scale": "routed_scaling_factor",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "rope_theta": "rope_theta",
}
"""Key of ModelArgs → Hugging Face's."""

YARN_KEYS = {
    "rope_factor": "factor",
    "original_seq_len": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}

UNSAID = {"norm_topk_prob": True, "rms_norm_eps": 1e-6, "attention_bias": False}
"""Behavior that DeepSeek's inference code hard-codes, in Hugging Face's keys."""

IMPLIED = UNSAID | {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "torch_dtype": "bfloat16",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}


def is_model_args(config: dict[str, Any]) -> bool:
    """Whether a config.json uses the keys of ModelArgs rather than Hugging Face's."""
    return "dim" in config and "n_layers" in config and "model_type" not in config


def model_args_to_hf(args: dict[str, Any], place: object = "config.json") -> dict[str, Any]:
    """The Hugging Face config of a model of these ModelArgs; absent keys take the published defaults.

    YaRN is present if `max_seq_len` exceeds `original_seq_len`, a quantization_config if `dtype` is fp8. Raises
    FxquantError for unknown keys, invalid values and a softmax router.
    """
    newer = {NEWER[key]: key for key in reversed(NEWER) if key in args}
    if newer:
        facts = "; ".join(f"{key}: the model's {reason}" for reason, key in reversed(newer.items()))
        way_out = f"These are ModelArgs of a later model; fxquant compiles those of {MODELS}."
        raise FxquantError(place, f"{facts}.", way_out)
    try:
        given = ModelArgs.model_validate(args)
    except ValidationError as error:
        way_out = f"Its keys are ModelArgs of DeepSeek's inference code; fxquant compiles those of {MODELS}."
        raise FxquantError(place, validation_fact(error, ModelArgs, args), way_out) from None
    config = IMPLIED | {official: getattr(given, key) for key, official in KEYS.items()}
    config |= {"num_key_value_heads": given.n_heads, "q_lora_rank": given.q_lora_rank or None, "rope_scaling": None}
    if given.max_seq_len > given.original_seq_len:
        yarn = {official: getattr(given, key) for key, official in YARN_KEYS.items()}
        # without a temperature too cos and sin stay as they are there
        unscaled = {} if given.mscale else {"attention_factor": 1.0}
        config["rope_scaling"] = {"type": "yarn", **yarn, "mscale_all_dim": given.mscale} | unscaled
    if given.dtype == "fp8":
        config["quantization_config"] = FP8 | ({"scale_fmt": given.scale_fmt} if given.scale_fmt else {})
    return config
