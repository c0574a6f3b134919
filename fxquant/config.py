"""config.json of a DeepSeek-V3 family checkpoint, validated."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fxquant.checkpoint_model_args import hf_to_model_args, is_model_args, model_args_to_hf, validation_fact
from fxquant.errors import FxquantError

__all__ = [
    "DeepseekV3Config", "RopeScaling", "hf_to_model_args", "model_args_to_hf", "parse_config", "read_config",
    "read_config_file", "yarn_mscale",
]  # fmt: skip

SUPPORTED = "DeepSeek-V3, DeepSeek-R1 and their family (model_type deepseek_v3)"
DENSE = "are dense, without latent attention or experts, so there is nothing for this compiler"
THIS = f"fxquant compiles {SUPPORTED}."
QUANTIZER = f"Use a general quantizer; {THIS}"
NEIGHBOURS = {
    "deepseek_v2": ("its router scores with softmax, DeepSeek-V3's with sigmoid", THIS),
    "deepseek_v32": ("its attention is sparse, chosen by an indexer that DeepSeek-V3 lacks", THIS),
    "kimi_k2": (
        "fxquant reads this architecture under DeepSeek's name only",
        "A Kimi-K2 whose architecture is DeepSeek-V3's can be given model_type deepseek_v3.",
    ),
    "qwen2": (f"Qwen2 models, DeepSeek-R1-Distill-Qwen among them, {DENSE}", QUANTIZER),
    "qwen3": (f"Qwen3 models, DeepSeek-R1-0528-Qwen3 among them, {DENSE}", QUANTIZER),
    "llama": (f"Llama models, DeepSeek-R1-Distill-Llama among them, {DENSE}", QUANTIZER),
}
"""model_type that is taken for DeepSeek-V3's → why it is none, and the way out."""


class RopeScaling(BaseModel):
    """YaRN parameters, DeepSeek's names and defaults (arXiv:2309.00071)."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    type: Literal["yarn"]
    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(default=4096, gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @model_validator(mode="before")
    @classmethod
    def _accept_rope_type(cls, data: Any) -> Any:
        return {"type": data.get("rope_type"), **data} if isinstance(data, dict) else data


class DeepseekV3Config(BaseModel):
    """The keys that shape the model; absent ones take DeepSeek-V3's published values, unknown ones are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    vocab_size: int = Field(default=129280, gt=0)
    hidden_size: int = Field(default=7168, gt=0)
    intermediate_size: int = Field(default=18432, gt=0)
    moe_intermediate_size: int = Field(default=2048, gt=0)
    num_hidden_layers: int = Field(default=61, gt=0)
    num_attention_heads: int = Field(default=128, gt=0)
    n_shared_experts: int = Field(default=1, ge=0)
    n_routed_experts: int = Field(default=256, gt=0)
    num_experts_per_tok: int = Field(default=8, gt=0)
    n_group: int = Field(default=8, gt=0)
    topk_group: int = Field(default=4, gt=0)
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 2.5
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    first_k_dense_replace: int = Field(default=3, ge=0)
    moe_layer_freq: Literal[1] = 1
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = Field(default=512, gt=0)
    qk_nope_head_dim: int = Field(default=128, gt=0)
    qk_rope_head_dim: int = Field(default=64, gt=0, multiple_of=2)
    v_head_dim: int = Field(default=128, gt=0)
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: Literal[True] = True
    tie_word_embeddings: Literal[False] = False
    max_position_embeddings: int = Field(default=163840, gt=0)
    num_nextn_predict_layers: int = Field(default=1, ge=0)
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1

    @model_validator(mode="after")
    def _experts_fit_their_groups(self) -> "DeepseekV3Config":
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"{self.n_routed_experts} experts do not form {self.n_group} groups, {self.topk_group} kept"
            )
        if self.num_experts_per_tok > self.topk_group * self.n_routed_experts // self.n_group:
            raise ValueError(f"{self.num_experts_per_tok} experts a token do not fit into {self.topk_group} groups")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Width of one query head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """`qk_head_dim ** -0.5`, times YaRN's `mscale_all_dim` correction squared."""
        scale = self.qk_head_dim**-0.5
        if self.rope_scaling and self.rope_scaling.mscale_all_dim:
            scale *= yarn_mscale(self.rope_scaling.factor, self.rope_scaling.mscale_all_dim) ** 2
        return scale


def yarn_mscale(factor: float, mscale: float) -> float:
    """Attention temperature of YaRN: `0.1 * mscale * ln(factor) + 1` for factor > 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder` in Hugging Face's keys; refuses what is not a checkpoint."""
    path = folder / "config.json"
    if not path.is_file():
        way_out = "Name a Hugging Face checkpoint folder, or put the model's config.json beside its weights."
        raise FxquantError(folder, "not a checkpoint: it has no config.json.", way_out)
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """A parsed config.json in Hugging Face's keys."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FxquantError(
            path, f"not valid JSON: {error}.", "Copy the file again from where the model came."
        ) from None
    if not isinstance(config, dict):
        raise FxquantError(path, f"holds a {type(config).__name__}, not an object.", "Copy the file again.")
    return model_args_to_hf(config, path) if is_model_args(config) else config


def parse_config(config: dict[str, Any], place: object) -> DeepseekV3Config:
    """Validate `config`; the error names the architecture and what is supported."""
    model_type = config.get("model_type")
    if str(model_type) in NEIGHBOURS:
        reason, way_out = NEIGHBOURS[str(model_type)]
        raise FxquantError(place, f"model_type is {model_type!r}: {reason}.", way_out)
    if model_type != "deepseek_v3":
        raise FxquantError(place, f"model_type is {model_type!r}.", THIS)
    try:
        return DeepseekV3Config.model_validate(_modern_rope(config))
    except ValidationError as error:
        raise FxquantError(place, validation_fact(error), THIS) from None


def _modern_rope(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes `rope_parameters` in place of `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    scaled = rope if rope.get("rope_type", "default") != "default" else None
    given = {key: value for key, value in config.items() if key != "rope_scaling" or value is not None}
    return {"rope_theta": rope.get("rope_theta", 10000.0), "rope_scaling": scaled, **given}
