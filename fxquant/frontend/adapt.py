"""Model adaptation: a foreign model as a `DeepseekV3`, its known classes replaced by ours and restored afterwards.

The decoder layers stay the user's: their forward runs unchanged, with our attention, MLP and norms inside. Masks,
caches and positions, which each family passes to its attention in its own way, go through a `Slot` instead.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adapters import Adapter
from fxquant.frontend.assemble import assemble, fetch, parameter
from fxquant.frontend.families import Family, family_of
from fxquant.models import DeepseekV3, layers, rotary
from fxquant.models.deepseek_v3 import Decoder, Head
from fxquant.policy.kinds import Kind
from fxquant.tracing.undeclared import forward_owner, undeclared

Leaves = Mapping[type[nn.Module], Adapter]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
TABLES = ("_modules", "_parameters", "_buffers")


class Slot:
    """What the running layer passes to its attention, bypassing the user's code between them."""

    cos: Tensor
    sin: Tensor
    attention_mask: Tensor
    past: Tensor
    present: Tensor | None = None


class Adaptation:
    """The adaptation of one model: converts module by module, and saves each module's state before its first change."""

    def __init__(self, family: Family | None, leaves: Leaves, config: DeepseekV3Config) -> None:
        self.family, self.leaves, self.config, self.slot = family, leaves, config, Slot()
        self._before: dict[int, tuple[nn.Module, dict[str, Any], dict[str, dict]]] = {}
        self._converted: dict[int, nn.Module] = {}

    def convert(self, module: nn.Module) -> nn.Module:
        """The replacement of `module`: what its adapter returns, or the module itself with its children converted."""
        if id(module) in self._converted:
            return self._converted[id(module)]
        adapter = self._adapter(module)
        converted = module
        if adapter is not None:
            converted = adapter(module, self)
            if self.family and getattr(converted, "kind", None) == Kind.ATTENTION:
                self._bridge_attention(converted, self.family)
        else:
            for name, child in list(module._modules.items()):
                if child is not None and self.convert(child) is not child:
                    self.touch(module)
                    setattr(module, name, self.convert(child))
        self._converted[id(module)] = converted
        return converted

    def layer(self, module: nn.Module, path: str) -> nn.Module:
        """Convert a decoder layer: its children get their checkpoint names, and its forward is bridged."""
        converted = self.convert(module)
        if converted is module and self.family is not None:
            self.touch(module)
            self._rename_children(module, self.family.layer_children)
            self._bridge_layer(module, self.family, path)
        return converted

    def mark(self, module: nn.Module, kind: Kind) -> nn.Module:
        """Set the kind of `module` and return it."""
        self.touch(module)
        module.kind = kind  # type: ignore[assignment]
        return module

    def float32(self, root: nn.Module) -> None:
        """Convert every parameter to float32, the dtype of tracing; raises FxquantError for one that is not a float."""
        for path, module in root.named_modules():
            for name, tensor in list(module._parameters.items()):
                if tensor is None or tensor.dtype is torch.float32:
                    continue
                if tensor.dtype not in FLOATS:
                    fact = f"a parameter of {type(module).__name__} is {tensor.dtype}."
                    raise FxquantError(f"{path}.{name}", fact, "Build the float model; fxquant quantizes it.")
                self.touch(module)
                setattr(module, name, parameter(tensor))

    def touch(self, module: nn.Module) -> None:
        """Save the state of `module`, unless it is saved already."""
        if id(module) not in self._before:
            # vars() alone would share these dicts, which adapting changes in place
            tables = {table: dict(vars(module)[table]) for table in TABLES}
            self._before[id(module)] = (module, dict(vars(module)), tables)

    def undo(self) -> None:
        """Restore every touched module."""
        for module, attributes, tables in self._before.values():
            vars(module).clear()
            vars(module).update(attributes)
            for table, content in tables.items():
                vars(module)[table].clear()
                vars(module)[table].update(content)
        self._before.clear()

    def _adapter(self, module: nn.Module) -> Adapter | None:
        """Looked up by the class that defines the forward: a subclass with its own forward is a different class."""
        owner = forward_owner(module)
        declared = self.leaves.get(type(module)) or self.leaves.get(owner)
        if declared is not None or self.family is None:
            return declared
        # by name: transformers may not be installed, and DeepSeek's classes live in the user's own file
        return self.family.adapters.get(owner.__name__)

    def _rename_children(self, module: nn.Module, names: Mapping[str, str]) -> None:
        children = dict(module._modules)
        module._modules.clear()
        for name, child in children.items():
            module._modules[names.get(name, name)] = child
            if name in names:
                vars(module)[name] = child  # the layer's own forward still reads it under its old name

    def _bridge_layer(self, layer: nn.Module, family: Family, path: str) -> None:
        inner, slot = layer.forward, self.slot

        def forward(x: Tensor, cos: Tensor, sin: Tensor, attention_mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
            slot.cos, slot.sin, slot.attention_mask, slot.past, slot.present = cos, sin, attention_mask, past, None
            x = family.call_layer(inner, x, (cos, sin))
            if slot.present is None:  # no adapted attention ran in this layer
                attention = layer._modules.get("self_attn")
                place = f"{path}.self_attn" if attention is not None else path
                raise undeclared(place, attention or layer, "is not an attention module with an adapter", rule="")
            return x, slot.present

        layer.forward = forward

    def _bridge_attention(self, attention: nn.Module, family: Family) -> None:
        inner, slot = attention.forward, self.slot

        def forward(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs[family.attention_input]
            x, slot.present = inner(x, slot.cos, slot.sin, slot.attention_mask, slot.past)
            return family.attention_result(x)

        attention.forward = forward


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
        yield root
    finally:
        adaptation.undo()


def _root(model: nn.Module, adaptation: Adaptation) -> DeepseekV3:
    """Our causal model and decoder, wrapped around the layers of `model`."""
    family, config = adaptation.family, adaptation.config
    assert family is not None
    embed, stack, norm, head = (
        fetch(model, family.parts[name]) for name in ("embed_tokens", "layers", "norm", "lm_head")
    )
    converted_head = adaptation.convert(head)
    if isinstance(converted_head, layers.Linear):
        converted_head = assemble(Head, weight=converted_head.weight, bias=converted_head.bias)
    decoder = assemble(
        Decoder,
        embed_tokens=adaptation.convert(embed),
        layers=nn.ModuleList(adaptation.layer(layer, f"model.layers.{index}") for index, layer in enumerate(stack)),
        norm=adaptation.convert(norm),
        inv_freq=rotary.frequencies(config),
        attention_factor=rotary.attention_factor(config),
    )
    return assemble(DeepseekV3, config=config, model=decoder, lm_head=converted_head)
