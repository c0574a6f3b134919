"""Adaptation: converts a foreign model's modules one by one.

A class that a published version or LEAVES says what it computes gives way to ours; every other runs its own forward.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend import adapters
from fxquant.frontend.adapters import Adapter, Attention, Experts, MoE
from fxquant.frontend.assemble import fetch, parameter, with_attributes
from fxquant.frontend.bridges import (
    bridge_attention,
    bridge_gate,
    bridge_layer,
    bridge_own_attention,
    bridge_parameters,
)
from fxquant.frontend.families import Family
from fxquant.frontend.own.expert_loop import grouped_forward
from fxquant.frontend.own.plain_experts import is_plain_linear, members, not_plain, swiglu_weights
from fxquant.frontend.recognition.difference import difference, kin
from fxquant.frontend.recognition.edited import edited, is_as_required, own_code
from fxquant.frontend.recognition.published import Version, is_torch, version_of
from fxquant.frontend.saved_state import SavedState
from fxquant.frontend.slot import Slot
from fxquant.policy.kinds import Kind
from fxquant.tracing.undeclared import forward_owner

Leaves = Mapping[type[nn.Module], Adapter]
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)
TORCH: dict[type[nn.Module], Adapter] = {nn.Linear: adapters.Linear(), nn.Embedding: adapters.Embedding()}
"""torch's own classes in models of a family."""

GROUPED = "experts run as one grouped operator"


class Adaptation(SavedState):
    """The adaptation of one model: converts module by module, and saves each module's state before its first change."""

    def __init__(self, family: Family | None, leaves: Leaves, config: DeepseekV3Config) -> None:
        super().__init__()
        self.family, self.leaves, self.config, self.slot = family, leaves, config, Slot()
        self.own_forwards: dict[str, str] = {}
        self._converted: dict[int, nn.Module] = {}
        self._experts: dict[int, tuple[nn.Module, str]] = {}

    def convert(self, module: nn.Module) -> nn.Module:
        """The replacement of `module`: what its adapter returns, or the module itself with its children converted."""
        if id(module) not in self._converted:
            adapter = self._adapter(module)
            converted = self._own(module) if adapter is None else with_attributes(adapter(module, self), module)
            if self.family and adapter is not None and getattr(converted, "kind", None) == Kind.ATTENTION:
                bridge_attention(converted, self.family, self.slot)
            self._converted[id(module)] = converted
        return self._converted[id(module)]

    def layer(self, module: nn.Module, path: str) -> nn.Module:
        """Convert a decoder layer: its children get their checkpoint names, and its forward is bridged."""
        converted = self.convert(module)
        if converted is module and self.family is not None:
            self.touch(module)
            self._rename(module, self.family.layer_children)
            bridge_layer(module, self.family, self.slot, path)
        return converted

    def gate(self, moe: nn.Module) -> nn.Module | None:
        """The gate of a published MoE that runs its own forward, (ids, weights) of x; None: it is published."""
        gate = moe._modules.get("gate")
        if self.family is None or gate is None or type(moe) in self.leaves or self._version(gate) is not None:
            return None
        own = self._own(gate)
        self.touch(own)
        bridge_gate(own, self.family)
        return own

    def check_experts(self, moe: nn.Module, experts: Any) -> None:
        """Raise FxquantError unless every expert is there once and, but for a `moe` in LEAVES, is a published one."""
        declared = self.family is None or bool({type(moe), forward_owner(moe)} & self.leaves.keys())
        for name, expert in members(experts):
            if expert is None:
                fact = f"{name} is None: only a part of the experts is here."
                raise FxquantError(type(moe).__name__, fact, "Build all of them, as on a single rank.")
            holder, first = self._experts.setdefault(id(expert), (moe, name))
            if (holder, first) != (moe, name):
                fact = f"{name} is the same module as {first}" + ("." if holder is moe else " of an earlier layer.")
                way_out = (
                    "A checkpoint has weights for each: build one module each, and copy weights in the checkpoint."
                )
                raise FxquantError(type(moe).__name__, fact, way_out)
            if not declared and isinstance(experts, nn.ModuleList):
                self._check_expert(expert)

    def _check_expert(self, expert: nn.Module) -> None:
        assert self.family is not None
        if self._version(expert) is None:
            raise edited(expert, self.family, GROUPED)
        reason = not_plain(expert)
        if reason:
            raise edited(expert, self.family, GROUPED, differs=f"    {reason}")

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

    def _adapter(self, module: nn.Module) -> Adapter | None:
        """Declared for the class or the base that defines its forward, or that of the published class that it is."""
        declared = self.leaves.get(type(module)) or self.leaves.get(forward_owner(module))
        if declared is not None or self.family is None:
            return declared
        torch_own = next((adapter for cls, adapter in TORCH.items() if is_torch(module, cls)), None)
        version = self._version(module)
        adapter = self.family.adapters.get(version.name) if version else None
        if isinstance(adapter, Attention) and not is_plain_linear(fetch(module, adapter.kv_b_proj)):
            adapter = None  # the absorbed form reads its weight, ours calls it
        return torch_own or adapter

    def _version(self, module: nn.Module) -> Version | None:
        """The published version that `module` is, with attributes as published."""
        assert self.family is not None
        version = version_of(module, self.family.versions)
        wanted = self.family.requires.get(version.name, {}) if version else {}
        return version if all(is_as_required(module, path, value) for path, value in wanted.items()) else None

    def _own(self, module: nn.Module) -> nn.Module:
        """The module with its own forward: children converted and, of a class made of a published one, named as in
        the checkpoint, its cache and its loop over experts handed to it in a form that can be traced."""
        made_of = kin(module, self.family.versions) if self.family and own_code(module) else None
        adapter = self.family.adapters.get(made_of.name) if self.family and made_of else None
        if made_of is not None and self.family is not None and isinstance(adapter, Experts):
            raise edited(module, self.family, GROUPED, made_of)
        if made_of is not None and self._version(module) is None:
            self.own_forwards.setdefault(type(module).__name__, difference(module, made_of))
        if isinstance(adapter, MoE):
            self._group_experts(module, adapter)
        elif self.family is None and own_code(module):
            self._group_own_experts(module)
        for name, child in list(module._modules.items()):
            if child is not None and self.convert(child) is not child:
                self.touch(module)
                setattr(module, name, self.convert(child))
        if made_of is not None and self.family is not None:
            self._named_as_published(module, made_of, self.family)
        if isinstance(adapter, Attention) and self.family is not None and made_of is not None:
            self.touch(module)
            bridge_own_attention(module, self.family, self.slot, made_of)
        return module

    def _named_as_published(self, module: nn.Module, made_of: Version, family: Family) -> None:
        kind = family.kinds.get(made_of.name)
        if kind is not None and getattr(module, "kind", None) is None:
            self.mark(module, kind)
        self._hold_buffers(module)
        self._rename(module, family.parameters.get(made_of.name, {}))

    def _hold_buffers(self, module: nn.Module) -> None:
        """Buffers that a checkpoint has, such as correction biases, become parameters, which a graph can have."""
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and name not in module._non_persistent_buffers_set:
                self.touch(module)
                del module._buffers[name]
                module._parameters[name] = parameter(buffer)

    def _group_experts(self, module: nn.Module, adapter: MoE) -> None:
        grouped = grouped_forward(module)
        if grouped is None:
            return
        forward, name = grouped
        self.touch(module)
        members = getattr(module, name)
        self.check_experts(module, members)
        setattr(module, name, adapter.routed(members))
        module.forward = forward

    def _group_own_experts(self, module: nn.Module) -> None:
        """As `_group_experts`, where no family says what an expert is: each is run, and must be a SwiGLU."""
        grouped = grouped_forward(module)
        experts = getattr(module, grouped[1]) if grouped else ()
        found = [swiglu_weights(expert) for expert in experts if expert is not None]
        names = found[0] if found else None
        if grouped is None or names is None or any(each != names for each in found):
            return
        self.check_experts(module, experts)
        self.touch(module)
        setattr(module, grouped[1], MoE(**names).routed(experts))
        module.forward = grouped[0]

    def _rename(self, module: nn.Module, names: Mapping[str, str]) -> None:
        """Children and parameters under the checkpoint's names; a forward of its own still reads them under the old."""
        if not any(name in module._modules or name in module._parameters for name in names):
            return
        self.touch(module)
        renamed = {name: names[name] for name in names if name in module._parameters}
        for table in (module._modules, module._parameters):
            held: dict[str, Any] = dict(table)
            table.clear()
            for name, value in held.items():
                table[names.get(name, name)] = value
                if name in names:
                    vars(module)[name] = value
        if renamed:
            bridge_parameters(module, renamed)

    def replace(self, model: nn.Module, path: str, part: nn.Module) -> None:
        """Set the child of `model` at dotted `path`."""
        holder, _, name = path.rpartition(".")
        parent = fetch(model, holder) if holder else model
        self.touch(parent)
        parent._modules[name] = part
