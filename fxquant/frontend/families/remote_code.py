"""modeling_deepseek.py of checkpoint folders: the `DeepseekV3ForCausalLM` that transformers 4 runs as remote code."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.frontend.families import transformers_v4, transformers_v5
from fxquant.frontend.families.base import State
from fxquant.frontend.slot import Slot
from fxquant.policy.kinds import Kind


def recognises(model: nn.Module) -> bool:
    """By attention that has its own rotary embedding."""
    return any({"rotary_emb", "kv_a_proj_with_mqa"} <= module._modules.keys() for module in model.modules())


def call_layer(forward: Callable[..., Any], x: Tensor, rotary: tuple[Tensor, Tensor], past: Tensor) -> Tensor:
    """A layer returns a tuple; its attention makes cosines and sines itself."""
    return forward(x, attention_mask=None, position_ids=None)[0]


def call_root(
    forward: Callable[..., Any], ids: Tensor, positions: Tensor, start: int, table: tuple[Tensor, Tensor]
) -> Tensor:
    """The root's forward without a mask, which its layers do not read: making one, it looks at the number of tokens."""
    decoder = forward.__self__.model  # type: ignore[attr-defined]
    chosen, decoder._use_flash_attention_2 = getattr(decoder, "_use_flash_attention_2", False), True
    try:
        return forward(input_ids=ids, position_ids=positions, use_cache=False).logits
    finally:
        decoder._use_flash_attention_2 = chosen


def step(model: nn.Module, ids: Tensor, state: State) -> tuple[Tensor, State]:
    """The model's forward, which needs a mask where the prompt is a single token."""
    state = _cache()() if state is None else state
    mask = torch.ones(1, state.get_seq_length() + ids.shape[1], dtype=torch.int64)
    output = model(input_ids=ids, attention_mask=mask, past_key_values=state, use_cache=True)
    return output.logits[:, -1], output.past_key_values


@cache
def _cache() -> Any:
    """transformers' cache with the method that releases after 4.53 have no more."""
    from transformers import DynamicCache

    class UsableCache(DynamicCache):
        def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> int:
            """Length of what a layer has; nothing is ever dropped."""
            return int(self.get_seq_length(layer_idx))

    return UsableCache


def rotary(model: nn.Module, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The rows of each layer's table, the first half of each."""
    for layer in model.model.layers:  # type: ignore[union-attr]
        cos, sin = layer.self_attn.rotary_emb(torch.zeros(1), seq_len=int(positions.max()) + 1)
        yield cos[positions].chunk(2, -1)[0], sin[positions].chunk(2, -1)[0]


def own_attention(attention: nn.Module, forward: Callable[..., Any], slot: Slot, x: Tensor) -> Any:
    """None can run: the graph's cache holds latents."""
    raise ValueError("it caches keys and values of all heads, not latents")


FAMILY = replace(
    transformers_v4.FAMILY,
    name="Hugging Face's remote code",
    recognises=recognises,
    adapters={
        **transformers_v4.FAMILY.adapters,
        "DeepseekV3Attention": replace(transformers_v5.ATTENTION, softmax_scale="softmax_scale"),
    },
    call_layer=call_layer,
    attention_result=lambda x: (x, None, None),
    step=step,
    call_root=call_root,
    versions="remote code",
    kinds={**transformers_v5.FAMILY.kinds, "MoEGate": Kind.GATE},
    requires={
        **transformers_v5.REQUIRES,
        "DeepseekV3Attention": {},
        "DeepseekV3MoE": {"ep_size": 1},
        "MoEGate": {"scoring_func": "sigmoid", "topk_method": "noaux_tc"},
    },
    rotary=rotary,
    flat_gate=False,
    own_attention=own_attention,
)
