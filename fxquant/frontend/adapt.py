"""Model adaptation: a foreign model as a `DeepseekV3`, its known classes replaced by ours and restored afterwards.

The decoder layers stay the user's: their forward runs unchanged, with our attention, MLP and norms inside. Masks,
caches and positions, which each family passes to its attention in its own way, go through a `Slot` instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adaptation import Adaptation, Leaves
from fxquant.frontend.assemble import assemble, fetch
from fxquant.frontend.bridges import bridge_own_layer
from fxquant.frontend.families import Family, family_of
from fxquant.frontend.own.root import own_root
from fxquant.frontend.recognition.published import version_of
from fxquant.frontend.slot import Slot
from fxquant.models import DeepseekV3, layers, rotary
from fxquant.models.deepseek_v3 import Decoder, Head


@contextmanager
def adapted(model: nn.Module, config: DeepseekV3Config, leaves: Leaves | None = None) -> Iterator[nn.Module]:
    """`model` in the form that is traced; all changes are undone on exit.

    `config` is the checkpoint's; families whose models carry their own config use that one. Models of
    `fxquant.models`, and others whose forward takes (input_ids, attention_mask, position_ids, past), keep their
    forward: only `leaves` are replaced. Raises FxquantError where an adapter does not find a part.
    """
    family = family_of(model)
    own = family.config(model, config) if family else config
    adaptation = Adaptation(family, leaves or {}, own)
    try:
        root = _root(model, adaptation) if family else adaptation.convert(model)
        adaptation.float32(root)
        if family:
            vars(root)["own_classes"] = sorted(adaptation.own_forwards)
        yield root
    finally:
        adaptation.undo()


def _root(model: nn.Module, adaptation: Adaptation) -> nn.Module:
    """Around the layers of `model`: our causal model and decoder, if its forward is a published one, else its own."""
    family = adaptation.family
    assert family is not None
    parts = _parts(model, adaptation, family)
    if _published_root(model, family):
        return _published(adaptation.config, parts)
    stack = cast("nn.ModuleList", parts["layers"])
    slots = [Slot() for _ in stack]
    for index, layer in enumerate(stack):
        bridge_own_layer(layer, adaptation.slot, slots[index], index)
    for name, path in family.parts.items():
        adaptation.replace(model, path, parts[name])
    return own_root(model, adaptation.config, parts, slots, family.call_root)


def _published_root(model: nn.Module, family: Family) -> bool:
    decoder = fetch(model, family.decoder) if family.decoder else None
    return all(version_of(each, family.versions) is not None for each in (model, decoder) if each is not None)


def _parts(model: nn.Module, adaptation: Adaptation, family: Family) -> dict[str, nn.Module]:
    embed, stack, norm, head = (
        fetch(model, family.parts[name]) for name in ("embed_tokens", "layers", "norm", "lm_head")
    )
    twice = next((index for index, layer in enumerate(stack) if layer in list(stack)[:index]), None)
    if twice is not None:
        fact = f"layer {twice} is the same module as layer {list(stack).index(stack[twice])}."
        raise FxquantError(type(model).__name__, fact, "A checkpoint has weights for each: build a module for each.")
    converted = adaptation.convert(head)
    if isinstance(converted, layers.Linear):
        converted = assemble(Head, weight=converted.weight, bias=converted.bias)
    stacked = nn.ModuleList(adaptation.layer(layer, f"model.layers.{index}") for index, layer in enumerate(stack))
    return {
        "embed_tokens": adaptation.convert(embed),
        "layers": stacked,
        "norm": adaptation.convert(norm),
        "lm_head": converted,
    }


def _published(config: DeepseekV3Config, parts: dict[str, nn.Module]) -> DeepseekV3:
    head = parts.pop("lm_head")
    angles = {"inv_freq": rotary.frequencies(config), "attention_factor": rotary.attention_factor(config)}
    return assemble(DeepseekV3, config=config, model=assemble(Decoder, **parts, **angles), lm_head=head)
