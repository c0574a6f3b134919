"""config.json of a DeepSeek-V3 family checkpoint, validated."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

from fxquant.checkpoint.config_keys import IN_ROTARY, Sized, changed, repeated, with_names
from fxquant.checkpoint.config_sizes import (
    DenseLayers,
    Experts,
    Heads,
    Layers,
    MtpLayers,
    NormEps,
    Positions,
    RopeTheta,
    RouteScale,
    SharedExperts,
    Size,
    TokenId,
)  # fmt: skip
from fxquant.checkpoint.model_args import SPARSE_ATTENTION, is_model_args, model_args_to_hf
from fxquant.checkpoint.rope_keys import RopeKeys, rope_keys
from fxquant.checkpoint.rope_scaling import RopeScaling, yarn_mscale
from fxquant.errors import FxquantError
from fxquant.inputs.json_file import read_json
from fxquant.inputs.limits import ALL_EXPERTS, CONFIG_BYTES, PARAMETERS
from fxquant.inputs.validation import cut, validation_fact

SUPPORTED = "DeepSeek-V3, DeepSeek-R1 and their family (model_type deepseek_v3 or kimi_k2)"
DENSE = "are dense, without latent attention or experts, so there is nothing to compile"
THIS = f"fxquant compiles {SUPPORTED}."
QUANTIZER = f"Use a general quantizer; {THIS}"
NEIGHBOURS = {
    "deepseek_v2": ("its router scores with softmax, DeepSeek-V3's with sigmoid", THIS),
    "deepseek_v32": (f"its {SPARSE_ATTENTION}", THIS),
    "glm_moe_dsa": (f"its {SPARSE_ATTENTION}", THIS),
    "deepseek_v4": ("its attention is compressed and windowed, its residual stream has several lanes", THIS),
    "kimi_linear": ("most of its layers have linear attention", THIS),
    "kimi_k25": (
        "it has a vision tower, and its language model stands under text_config",
        "The language model alone, with text_config as its config.json, is of model_type kimi_k2.",
    ),
    "qwen2": (f"Qwen2 models, DeepSeek-R1-Distill-Qwen among them, {DENSE}", QUANTIZER),
    "qwen3": (f"Qwen3 models, DeepSeek-R1-0528-Qwen3 among them, {DENSE}", QUANTIZER),
    "llama": (f"Llama models, DeepSeek-R1-Distill-Llama among them, {DENSE}", QUANTIZER),
}
"""model_type that may be mistaken for DeepSeek-V3 → the difference, and the remedy."""
KEYS = f"{THIS} If the model does not do that, or its model.py does it itself, remove the key."
MOST_FACTS = 3


class DeepseekV3Config(BaseModel):
    """The keys that define the model. Absent keys take DeepSeek-V3's published values.

    Numbers must not be strings or booleans, and are bounded by `fxquant.inputs.limits`. Rotary keys are those of
    transformers 4, whatever the file uses; other keys are the business of `parse_config`.
    """

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)
    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    vocab_size: Size = 129280
    hidden_size: Size = 7168
    intermediate_size: Size = 18432
    moe_intermediate_size: Size = 2048
    num_hidden_layers: Layers = 61
    num_attention_heads: Heads = 128
    n_shared_experts: SharedExperts = 1
    n_routed_experts: Experts = 256
    num_experts_per_tok: Experts = 8
    n_group: Experts = 8
    topk_group: Experts = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: RouteScale = 2.5
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    first_k_dense_replace: DenseLayers = 3
    moe_layer_freq: Literal[1] = 1
    q_lora_rank: Size | None = 1536
    kv_lora_rank: Size = 512
    qk_nope_head_dim: Size = 128
    qk_rope_head_dim: Size = Field(default=64, multiple_of=2)
    v_head_dim: Size = 128
    hidden_act: Literal["silu"] = "silu"
    attention_bias: bool = False
    rms_norm_eps: NormEps = 1e-6
    rope_theta: RopeTheta = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_interleave: Literal[True] = True
    tie_word_embeddings: Literal[False] = False
    max_position_embeddings: Positions = 163840
    num_nextn_predict_layers: MtpLayers = 1
    bos_token_id: TokenId | None = 0
    eos_token_id: TokenId | list[TokenId] | None = 1

    @model_validator(mode="after")
    def _experts_fit_their_groups(self) -> "DeepseekV3Config":
        groups, selected_groups, selected = self.n_group, self.topk_group, self.num_experts_per_tok
        said = f"n_routed_experts {self.n_routed_experts}, n_group {groups}, topk_group {selected_groups}"
        if self.n_routed_experts % groups or selected_groups > groups:
            raise ValueError(
                f"{said}: {self.n_routed_experts} experts do not form {groups} groups, {selected_groups} kept"
            )
        if selected > selected_groups * (self.n_routed_experts // groups):
            fact = f"{selected} experts per token do not fit into {selected_groups} groups"
            raise ValueError(f"{said}, num_experts_per_tok {selected}: {fact}")
        _check_size(self)
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def num_key_value_heads(self) -> int:
        """As many as heads: latent attention has no fewer. transformers divides by it, and has a default of its own."""
        return self.num_attention_heads

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


def _check_size(config: DeepseekV3Config) -> None:
    """Raise ValueError if the model has more experts or parameters than `fxquant.inputs.limits` allows."""
    layers, experts = config.num_hidden_layers + config.num_nextn_predict_layers, config.n_routed_experts
    sparse = max(layers - config.first_k_dense_replace, 0)
    if sparse * experts > ALL_EXPERTS:
        said = f"n_routed_experts {experts:,} in each of {sparse:,} layers"
        raise ValueError(f"{said} are {sparse * experts:,} experts, at most {ALL_EXPERTS:,} are read")
    total = _parameters(config, layers, sparse)
    if total > PARAMETERS:
        said = f"hidden_size {config.hidden_size:,}, num_hidden_layers {config.num_hidden_layers:,} and the other sizes"
        raise ValueError(f"{said} make {total:.2e} parameters, at most {PARAMETERS:.0e} are read")


def _parameters(config: DeepseekV3Config, layers: int, sparse: int) -> int:
    """Number of parameters in the matrices of a model, prediction layers included."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    attention = hidden * queries if rank is None else rank * (hidden + queries)
    attention += hidden * (config.kv_lora_rank + config.qk_rope_head_dim + heads * config.v_head_dim)
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    expert = 3 * hidden * config.moe_intermediate_size
    moe = (config.n_routed_experts + config.n_shared_experts) * expert + config.n_routed_experts * hidden
    outer = 2 * (1 + config.num_nextn_predict_layers) * hidden * (config.vocab_size + hidden)
    return layers * attention + sparse * moe + (layers - sparse) * 3 * hidden * config.intermediate_size + outer


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed config.json of `folder` in Hugging Face's keys. Raises FxquantError if there is none."""
    path = folder / "config.json"
    if not path.is_file():
        way_out = "Pass a Hugging Face checkpoint folder, or put the model's config.json beside its weights."
        raise FxquantError(folder, "not a checkpoint: it has no config.json.", way_out)
    return read_config_file(path)


def read_config_file(path: Path) -> dict[str, Any]:
    """A parsed config.json in Hugging Face's keys. NaN, infinities and duplicate keys are read as Python reads them."""
    config = read_json(path, CONFIG_BYTES, "Copy the file again from the model's source.", lenient=True)
    if not isinstance(config, dict):
        raise FxquantError(path, f"holds a {type(config).__name__}, not an object.", "Copy the file again.")
    return model_args_to_hf(config, path) if is_model_args(config) else config


def parse_config(config: dict[str, Any], place: object) -> DeepseekV3Config:
    """Validate `config`. Errors name the architecture and those supported, or the key that makes it another model."""
    model_type = config.get("model_type")
    if str(model_type) in NEIGHBOURS:
        reason, way_out = NEIGHBOURS[str(model_type)]
        raise FxquantError(place, f"model_type is {model_type!r}: {reason}.", way_out)
    if model_type not in ("deepseek_v3", "kimi_k2"):
        raise FxquantError(place, f"model_type is {cut(repr(model_type), 60)}.", THIS)
    try:
        document = with_names(config)
        keys = rope_keys(document)
    except ValueError as error:
        raise FxquantError(place, f"{error}.", THIS) from None
    _refuse(place, [*changed(document), *_in_rotary(keys)], KEYS)
    document |= {"model_type": "deepseek_v3", "rope_theta": keys.theta, "rope_scaling": keys.scaling}
    if document.get("n_shared_experts", 0) is None:
        document["n_shared_experts"] = 0
    try:
        parsed = DeepseekV3Config.model_validate(document)
    except ValidationError as error:
        fact = keys.as_spelled(validation_fact(error, DeepseekV3Config, document))
        raise FxquantError(place, fact, THIS) from None
    _refuse(place, repeated(config, _sizes(parsed)), "Correct it, or remove it: the other keys say it.")
    return parsed


def _in_rotary(keys: RopeKeys) -> Iterator[str]:
    if isinstance(keys.given, dict):
        yield from (f"{keys.spelling}.{fact}" for fact in changed(keys.given, IN_ROTARY))


def _sizes(config: DeepseekV3Config) -> tuple[Sized, ...]:
    rotary = config.qk_rope_head_dim, "transformers takes it for qk_rope_head_dim"
    return (
        Sized("head_dim", *rotary),
        Sized("rotary_dim", *rotary),
        Sized("qk_head_dim", config.qk_head_dim, "qk_nope_head_dim and qk_rope_head_dim make it"),
    )


def _refuse(place: object, facts: Iterable[str], way_out: str) -> None:
    if said := list(facts):
        more = f" And {len(said) - MOST_FACTS} more." if len(said) > MOST_FACTS else ""
        raise FxquantError(place, " ".join(f"{fact}." for fact in said[:MOST_FACTS]) + more, way_out)
