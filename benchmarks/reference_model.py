"""Model code that the reference quantizer loads with a checkpoint: transformers' DeepSeek-V3.

Its layers find their own rotary tables: the tool calls the layer of multi-token prediction without any.

`reference_quantizer.py` copies it beside the weights, as `auto_map` of config.json wants it. It runs in the environment
of the tool alone.
"""

from typing import Any

from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3DecoderLayer,
    DeepseekV3ForCausalLM,
    DeepseekV3RotaryEmbedding,
)


class Layer(DeepseekV3DecoderLayer):
    """A decoder layer; always returns a tuple."""

    def __init__(self, config: DeepseekV3Config, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        gate = getattr(self.mlp, "gate", None)
        if gate is not None:  # the tool loads parameters alone, and transformers has this in a buffer
            bias = gate._buffers.pop("e_score_correction_bias")
            gate.e_score_correction_bias = nn.Parameter(bias.float(), requires_grad=False)
        self._rotary = [DeepseekV3RotaryEmbedding(config=config)]  # in a list: no buffer of this module

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor | None = None, position_embeddings: Any = None, **given: Any
    ) -> Any:
        # the tool makes eh_proj in float32, and so what it feeds to the layer of multi-token prediction
        hidden_states = hidden_states.to(self.input_layernorm.weight.dtype)
        if position_embeddings is None:
            position_embeddings = self._rotary[0](hidden_states, position_ids)
        given["past_key_value"], given["use_cache"] = None, False
        result = super().forward(
            hidden_states, position_ids=position_ids, position_embeddings=position_embeddings, **given
        )
        return result if isinstance(result, tuple) else (result,)


class ForCausalLM(DeepseekV3ForCausalLM):
    """The model, of such layers."""

    config_class = DeepseekV3Config

    def __init__(self, config: DeepseekV3Config) -> None:
        super().__init__(config)
        layers = (Layer(config, index) for index in range(config.num_hidden_layers))
        self.model.layers = nn.ModuleList(layers)
        self.post_init()
