"""ModelArgs from a config: the arguments with which DeepSeek's inference model.py builds the model."""

from collections.abc import Iterator
from typing import Any, Literal

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.checkpoint.model_args import KEYS, UNSAID, YARN_KEYS, ModelArgs
from fxquant.errors import FxquantError


def hf_to_model_args(config: DeepseekV3Config, dtype: Literal["bf16", "fp8"] = "bf16") -> dict[str, Any]:
    """The ModelArgs for this config, without its prediction layers. `dtype` is that of the weights.

    Raises FxquantError for what DeepSeek's inference code does not support: biases, another norm, other YaRN.
    """
    for fact in _unsayable(config):
        raise FxquantError("config.json", f"ModelArgs cannot express {fact}.", "Keep Hugging Face's config.json.")
    args = {key: getattr(config, official) for key, official in KEYS.items()}
    args |= {"dtype": dtype, "q_lora_rank": config.q_lora_rank or 0}
    args["original_seq_len"] = max(ModelArgs.model_fields["original_seq_len"].default, config.max_position_embeddings)
    if config.rope_scaling:
        args |= {key: getattr(config.rope_scaling, official) for key, official in YARN_KEYS.items()}
        args["mscale"] = config.rope_scaling.mscale_all_dim or 0.0
    return ModelArgs(**args).model_dump(exclude={"max_batch_size", "scale_fmt"})


def _unsayable(config: DeepseekV3Config) -> Iterator[str]:
    """The settings of `config` that ModelArgs cannot express."""
    for key, value in UNSAID.items():
        if getattr(config, key) != value:
            yield f"{key} {getattr(config, key)}: it is always {value}"
    yarn, positions = config.rope_scaling, config.max_position_embeddings
    if yarn and yarn.attention_factor not in (None, 1):
        yield f"attention_factor {yarn.attention_factor}: cos and sin are never scaled"
    elif yarn and yarn.rotary_scale != 1:
        yield f"mscale {yarn.mscale} and mscale_all_dim {yarn.mscale_all_dim}: it has one value for both"
    if yarn and not yarn.truncate:
        yield "truncate false: it is always true"
    if yarn and yarn.factor < 1:
        yield f"YaRN of factor {yarn.factor}: it must be at least 1"
    if yarn and positions <= yarn.original_max_position_embeddings:
        yield f"YaRN for {positions} positions: it needs more than original_max_position_embeddings"
