"""How large the numbers of a config may be, one by one and together."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fxquant.inputs import limits

if TYPE_CHECKING:
    from fxquant.checkpoint.config import DeepseekV3Config

Size = Annotated[int, Field(gt=0, le=limits.WIDTH)]
Layers = Annotated[int, Field(gt=0, le=limits.LAYERS)]
DenseLayers = Annotated[int, Field(ge=0, le=limits.LAYERS)]
MtpLayers = Annotated[int, Field(ge=0, le=limits.MTP_LAYERS)]
Heads = Annotated[int, Field(gt=0, le=limits.HEADS)]
Experts = Annotated[int, Field(gt=0, le=limits.EXPERTS)]
SharedExperts = Annotated[int, Field(ge=0, le=limits.EXPERTS)]
Positions = Annotated[int, Field(gt=0, le=limits.POSITIONS)]
TokenId = Annotated[int, Field(ge=-(2**31), lt=2**31)]
NormEps = Annotated[float, Field(ge=0, le=1)]
RouteScale = Annotated[float, Field(gt=0, le=1e6)]
RopeTheta = Annotated[float, Field(gt=1, le=1e12)]
"""YaRN divides by its logarithm."""
YarnFactor = Annotated[float, Field(ge=1e-3, le=1e6)]
YarnBeta = Annotated[float, Field(gt=0, le=1e6)]
"""Turns: their logarithm is taken."""
YarnScale = Annotated[float, Field(ge=0, le=100)]


def check_size(config: "DeepseekV3Config") -> None:
    """Raises ValueError for more experts or parameters in all than `fxquant.inputs.limits` allows."""
    layers, experts = config.num_hidden_layers + config.num_nextn_predict_layers, config.n_routed_experts
    sparse = max(layers - config.first_k_dense_replace, 0)
    if sparse * experts > limits.ALL_EXPERTS:
        said = f"n_routed_experts {experts:,} in each of {sparse:,} layers"
        raise ValueError(f"{said} are {sparse * experts:,} experts, at most {limits.ALL_EXPERTS:,} are read")
    total = _parameters(config, layers, sparse)
    if total > limits.PARAMETERS:
        said = f"hidden_size {config.hidden_size:,}, num_hidden_layers {config.num_hidden_layers:,} and the other sizes"
        raise ValueError(f"{said} make {total:.2e} parameters, at most {limits.PARAMETERS:.0e} are read")


def _parameters(config: "DeepseekV3Config", layers: int, sparse: int) -> int:
    """Numbers in the matrices of a model, prediction layers included."""
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.q_lora_rank
    queries = heads * config.qk_head_dim
    attention = hidden * queries if rank is None else rank * (hidden + queries)
    attention += hidden * (config.kv_lora_rank + config.qk_rope_head_dim + heads * config.v_head_dim)
    attention += config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    expert = 3 * hidden * config.moe_intermediate_size
    moe = (config.n_routed_experts + config.n_shared_experts) * expert + config.n_routed_experts * hidden
    outer = 2 * (1 + config.num_nextn_predict_layers) * hidden * (config.vocab_size + hidden)
    return layers * attention + sparse * moe + (layers - sparse) * 3 * hidden * config.intermediate_size + outer
