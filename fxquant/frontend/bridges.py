"""Bridges: forwards of a user's modules as those around them call, and are called by, ours.

The caller has saved each module's state.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxquant.errors import FxquantError
from fxquant.frontend.families import Family
from fxquant.frontend.recognition.difference import difference
from fxquant.frontend.recognition.edited import edited
from fxquant.frontend.recognition.published import Version
from fxquant.frontend.slot import Slot
from fxquant.tracing.undeclared import undeclared


def bridge_layer(layer: nn.Module, family: Family, slot: Slot, path: str) -> None:
    """A layer takes what ours take; what its attention needs goes by `slot`."""
    inner = layer.forward

    def forward(x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        slot.cos, slot.sin, slot.attention_mask, slot.past, slot.present = cos, sin, attention_mask, past, None
        x = family.call_layer(inner, x, (cos, sin), past)
        if slot.present is None:  # no adapted attention ran in this layer
            attention = layer._modules.get("self_attn")
            place = f"{path}.self_attn" if attention is not None else path
            raise undeclared(place, attention or layer, "is not an attention module with an adapter", rule="")
        return x, slot.present

    vars(layer)["own_forward"] = inner
    layer.forward = forward


def bridge_own_layer(layer: nn.Module, current: Slot, slot: Slot, index: int) -> None:
    """Under a root's own forward a layer takes what that passes, and its attention, by `current`, what `slot` holds."""
    inner = vars(layer)["own_forward"]

    def forward(*args: Any, **kwargs: Any) -> Any:
        vars(current).update(vars(slot))
        result = inner(*args, **kwargs)
        if current.present is None:
            raise undeclared(f"model.layers.{index}", layer, "is not an attention module with an adapter", rule="")
        slot.present = current.present
        return result

    layer.forward = forward


def bridge_attention(attention: nn.Module, family: Family, slot: Slot) -> None:
    """Our attention, called as the layer calls its own."""
    inner = attention.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[family.attention_input]
        x, slot.present = inner(x, slot.cos, slot.sin, slot.attention_mask, slot.past)
        return family.attention_result(x)

    attention.forward = forward


def bridge_own_attention(attention: nn.Module, family: Family, slot: Slot, made_of: Version) -> None:
    """An attention whose own forward runs; an error in it names what differs from the published class."""
    inner = attention.forward
    differs = difference(attention, made_of)

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else kwargs[family.attention_input]
        try:
            return family.own_attention(attention, inner, slot, x)
        except FxquantError:
            raise
        except Exception as error:
            reason = f"its own forward cannot be traced: {type(error).__name__}: {error}".split("\n")[0]
            raise edited(attention, family, reason, made_of, differs) from error

    attention.forward = forward


def bridge_gate(gate: nn.Module, family: Family) -> None:
    """A gate whose own forward runs, as our MoE calls it: x [..., H] → ids, weights [..., top_k]."""
    inner = gate.forward

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        result = inner(x.flatten(0, -2) if family.flat_gate else x)
        ids = next(each for each in result if not each.is_floating_point())
        weights = next(each for each in reversed(result) if each.is_floating_point() and each.shape == ids.shape)
        shape = (*x.shape[:-1], ids.shape[-1])
        return ids.reshape(shape), weights.float().reshape(shape)

    gate.forward = forward


def bridge_parameters(module: nn.Module, renamed: Mapping[str, str]) -> None:
    """A forward that reads parameters under their old names."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        vars(module).update((old, module._parameters[new]) for old, new in renamed.items())  # export swaps them
        return inner(*args, **kwargs)

    module.forward = forward
