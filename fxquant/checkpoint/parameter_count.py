"""How large a model may be in all: its experts and parameters, from the sizes of its config."""

from typing import Protocol

from fxquant.inputs import limits


class Sizes(Protocol):
    """What is counted of a `DeepseekV3Config`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_nextn_predict_layers(self) -> int: ...
    @property
    def first_k_dense_replace(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def n_routed_experts(self) -> int: ...
    @property
    def n_shared_experts(self) -> int: ...
    @property
    def q_lora_rank(self) -> int | None: ...
    @property
    def kv_lora_rank(self) -> int: ...
    @property
    def qk_rope_head_dim(self) -> int: ...
    @property
    def qk_nope_head_dim(self) -> int: ...
    @property
    def qk_head_dim(self) -> int: ...
    @property
    def v_head_dim(self) -> int: ...


def check_size(config: Sizes) -> None:
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


def _parameters(config: Sizes, layers: int, sparse: int) -> int:
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
