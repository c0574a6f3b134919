"""Model family: how one source of DeepSeek-V3 models names and calls its classes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.frontend.adapters import Adapter
from fxquant.frontend.own.root import Call
from fxquant.frontend.slot import Slot
from fxquant.policy.kinds import Kind

State = Any
"""A family's own cache between two steps; None before the first."""


@dataclass(frozen=True)
class Family:
    """How a family builds DeepSeek-V3 from its own classes.

    root              class of the whole model or of a base of it, "" for any; `recognises` looks at its parts
    parts             embed_tokens, layers, norm, lm_head → dotted path in the model
    layer_children    a layer's name for a child → the checkpoint's name, where they differ
    adapters          class that defines a forward → its adapter
    attention_input   keyword with which a layer passes its hidden states to attention
    call_layer        (forward of a layer, hidden states, (cos, sin), past [B, …, latent]) → hidden states
    attention_result  output of our attention → what the layer expects its attention to return
    step              (model, ids int64 [1, S], state) → logits [1, vocabulary] of the last position, state; the model's
                      own forward with its own cache
    config            (model, config of the checkpoint) → the sizes that the model itself was built with
    decoder           dotted path of the module between root and layers, "" where the root runs them
    call_root         calls the root's own forward, see own/root.py
    versions          the family's name in recognition/versions.json
    kinds             published class → kind of module, for policies, where it runs its own forward
    parameters        published class → its name for a parameter or child → the checkpoint's name, where they differ
    requires          published class → dotted path of an attribute → the value with which it computes what its adapter
                      says, or a function that is true of such values; an attribute that is not there is one
    rotary            (model, positions int64 [P]) → cos, sin [P, qk_rope_head_dim / 2] of each of its own tables
    prepare           (model, its config): complete a model that its file builds in part, on the device it is on
    flat_gate         whether a gate is given tokens [N, H], not hidden states [B, S, H]
    own_attention     runs an attention's own forward: (attention, forward, slot, x) → what it returns
    """

    name: str
    root: str
    recognises: Callable[[nn.Module], bool]
    parts: Mapping[str, str]
    layer_children: Mapping[str, str]
    adapters: Mapping[str, Adapter]
    attention_input: str
    call_layer: Callable[[Callable[..., Any], Tensor, tuple[Tensor, Tensor], Tensor], Tensor]
    attention_result: Callable[[Tensor], Any]
    step: Callable[[nn.Module, Tensor, State], tuple[Tensor, State]]
    config: Callable[[nn.Module, DeepseekV3Config], DeepseekV3Config]
    decoder: str
    call_root: Call
    versions: str
    kinds: Mapping[str, Kind]
    parameters: Mapping[str, Mapping[str, str]]
    requires: Mapping[str, Mapping[str, Any]]
    rotary: Callable[[nn.Module, Tensor], Iterator[tuple[Tensor, Tensor]]]
    prepare: Callable[[nn.Module, DeepseekV3Config], None]
    flat_gate: bool
    own_attention: Callable[[nn.Module, Callable[..., Any], Slot, Tensor], Any]
