"""What there is to know about a family of sources."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.frontend.adapters import Adapter

State = Any
"""A family's own cache between two steps; None before the first."""


@dataclass(frozen=True)
class Family:
    """How a family builds DeepSeek-V3 of its own classes.

    root              class that defines the forward of the whole model; `recognises` tells families apart that share it
    parts             embed_tokens, layers, norm, lm_head → dotted path in the model
    layer_children    what a layer calls a child → what the checkpoint calls it, where they differ
    adapters          class that defines a forward → its adapter
    attention_input   keyword under which a layer hands its hidden states to the attention
    call_layer        (forward of a layer, hidden states, (cos, sin)) → hidden states
    attention_result  what a layer expects of its attention, from the attention's output
    step              (model, ids int64 [1, S], state) → logits [1, vocabulary] of the last position, state; the model's
                      own forward with its own cache
    config            (model, config of the checkpoint) → the sizes that the model itself was built with
    """

    name: str
    root: str
    recognises: Callable[[nn.Module], bool]
    parts: Mapping[str, str]
    layer_children: Mapping[str, str]
    adapters: Mapping[str, Adapter]
    attention_input: str
    call_layer: Callable[[Callable[..., Any], Tensor, tuple[Tensor, Tensor]], Tensor]
    attention_result: Callable[[Tensor], Any]
    step: Callable[[nn.Module, Tensor, State], tuple[Tensor, State]]
    config: Callable[[nn.Module, DeepseekV3Config], DeepseekV3Config]
