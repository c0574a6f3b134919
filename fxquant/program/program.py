"""The IR: an fx graph on the meta device plus its parameters and recipes."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fxquant.policy.kinds import Kind
from fxquant.policy.policy import Rule
from fxquant.policy.smooth_rules import PairKind, SmoothRule
from fxquant.program.graph import ProgramGraph
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs
from fxquant.transforms.rotation import Rotation


@dataclass(frozen=True)
class Parameter:
    """One tensor of the graph, whose target is the name of `role` in `module`.

    names  its tensors on disk, one per expert if `stacked`, else one
    role   what it is to its module: "weight", "bias", …
    """

    names: tuple[str, ...]
    module: str
    kind: Kind
    role: str
    stacked: bool = False

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The module of each of `names`."""
        return tuple(module_and_role(name)[0] for name in self.names)


@dataclass
class MtpLayers:
    """Multi-token prediction layers: stored, but in no graph of an output.

    layers         their paths in the checkpoint, stored or not
    recipes        module path → how its tensors are made
    float_tensors  checkpoint tensor → its module, for those that stay float
    gate_biases    those of `float_tensors` that are stored in float32, whatever their dtype in the checkpoint
    """

    layers: tuple[str, ...] = ()
    recipes: dict[str, Recipe] = field(default_factory=dict)
    float_tensors: dict[str, str] = field(default_factory=dict)
    gate_biases: tuple[str, ...] = ()

    @property
    def stored(self) -> bool:
        """Whether the output has any."""
        return bool(self.recipes or self.float_tensors)

    @property
    def static(self) -> bool:
        """Whether a linear needs a calibrated range."""
        return any(recipe.scheme.static for recipe in self.recipes.values())


@dataclass(frozen=True)
class Pair:
    """A value to smooth by `rule`: the weight that scales it on one side, the weights that read it on the other.

    value      the node of a norm, an attention or a swiglu, whose last axis is scaled, or that of experts: then it is
               what each of them multiplies by its own down_proj
    maker      target of the norm's weight, or of the weight that computes the attention's values or the swiglu's up
    consumers  targets of the weights that it is multiplied by
    """

    kind: PairKind
    value: fx.Node
    maker: str
    consumers: tuple[str, ...]
    rule: SmoothRule


@dataclass
class Program:
    """A graph whose `get_attr` targets are the keys of `parameters`, and the recipes of its quantized modules.

    graph       inputs input_ids, attention_mask, position_ids, past_0, past_1, …; outputs logits, present_0, …
    parameters  float parameters name checkpoint tensors, quantized ones tensors of the weight file
    recipes     graph module path → how its tensors are made
    rules       module path → the policy rule that decided it; unused_rules: those that decided nothing
    names       node names in use
    mtp         the multi-token prediction layers of the output
    pairs       values that calibration will smooth, in graph order; added: the biases (on meta) that shifts need
    rotations   checkpoint weight → how it is rotated
    stream      features of the residual stream, if it is rotated; else 0

    Every node carries `meta["module"]`, the path of the module that made it, `meta["kind"]` and `meta["block"]`: the
    path of its decoder layer, or "before", "between_0", …, "after" for nodes outside of any.
    """

    graph: ProgramGraph
    config: dict[str, Any]
    dtype: torch.dtype
    parameters: dict[str, Parameter] = field(default_factory=dict)
    recipes: dict[str, Recipe] = field(default_factory=dict)
    rules: dict[str, Rule] = field(default_factory=dict)
    unused_rules: list[Rule] = field(default_factory=list)
    names: set[str] = field(default_factory=set)
    mtp: MtpLayers = field(default_factory=MtpLayers)
    pairs: list[Pair] = field(default_factory=list)
    added: dict[str, torch.Tensor] = field(default_factory=dict)
    rotations: dict[str, Rotation] = field(default_factory=dict)
    stream: int = 0

    def nodes(self, target: Any) -> list[fx.Node]:
        """Calls of one operator, in graph order."""
        return [node for node in self.graph.graph.nodes if node.op == "call_function" and node.target == target]

    def parameter(self, node: fx.Node) -> Parameter:
        """What a `get_attr` node reads."""
        return self.parameters[str(node.target)]

    def float_names(self) -> dict[str, Parameter]:
        """Checkpoint tensor → parameter, for all parameters that no recipe makes."""
        quantized = {name for recipe in self.recipes.values() for name in made_parameters(recipe)}
        return {name: p for target, p in self.parameters.items() if target not in quantized for name in p.names}

    def add_parameter(self, target: str, tensor: torch.Tensor, parameter: Parameter) -> None:
        """Register `tensor` (meta) under the dotted `target`."""
        self.graph.tensors[target] = tensor
        self.parameters[target] = parameter

    def drop_unused_parameters(self) -> None:
        """Remove the parameters that no node reads."""
        used = {node.target for node in self.graph.graph.nodes if node.op == "get_attr"}
        for target in [target for target in self.parameters if target not in used]:
            del self.parameters[target]
            del self.graph.tensors[target]


def made_parameters(recipe: Recipe) -> Iterator[str]:
    """Graph targets that the tensors of a recipe may have."""
    return (tensor_name(recipe.module, role) for role in tensor_specs(recipe))
