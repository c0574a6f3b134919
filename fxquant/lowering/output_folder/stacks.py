"""Stacks: int4 tensors of all experts of a layer in one stored tensor, as QMoE reads them; every expert has its slice.

Rows of gate and up weights alternate in one stack, so each lies there in runs of one row; all other slices are whole.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from fxquant.program.experts import ExpertRecipes, expert_recipes
from fxquant.program.program import Program
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.schemes.schemes import Recipe, TensorSpec, tensor_specs
from fxquant.schemes.weight_formats import WeightFormat
from fxquant.storage.sliced_tensor import Runs

GATE_UP = "gate_up_proj"


class Slice(NamedTuple):
    """`role` of `module`, made by `recipe`: a tensor of one expert, and where it lies."""

    module: str
    role: str
    recipe: Recipe
    spec: TensorSpec
    runs: Runs

    @property
    def name(self) -> str:
        """Its name, by which everything but the weight file's header knows it."""
        return tensor_name(self.module, self.role)


@dataclass(frozen=True)
class Stack:
    """A stored tensor, and its slices."""

    name: str
    spec: TensorSpec
    slices: tuple[Slice, ...]


def stacked_experts(program: Program) -> Iterator[ExpertRecipes]:
    """Experts whose int4 weights are stored in stacks."""
    for experts in expert_recipes(program):
        if all(recipe.int4 and recipe.weight_format is WeightFormat.BLOCKS for recipe in experts.all):
            yield experts


def gate_up_name(experts: ExpertRecipes) -> str:
    """Name of the stack of gate and up weights, uint8 [E, 2 I, H/2]: row 2i is row i of the gate, 2i + 1 of up."""
    parent, _ = module_and_role(experts.gate.module)
    return tensor_name(tensor_name(parent, GATE_UP), "weight")


def stacks_of(experts: ExpertRecipes) -> list[Stack]:
    """The stacks of a layer: weights, [E, …] of each; then scales by projection, in the order of their roles."""
    weights = [_stack(gate_up_name(experts), (experts.gate, experts.up), "weight")]
    weights.append(_stack(tensor_name(experts.down.module, "weight"), (experts.down,), "weight"))
    scales = [
        _stack(tensor_name(recipe.module, role), (recipe,), role)
        for recipe in experts.all
        for role in tensor_specs(recipe)
        if role != "weight"
    ]
    return weights + scales


def _stack(name: str, recipes: tuple[Recipe, ...], role: str) -> Stack:
    """`role` of each expert, its rows alternating with those of the other recipes."""
    spec, several = tensor_specs(recipes[0])[role], len(recipes)
    rows, *rest = spec.shape
    experts = len(recipes[0].modules)
    whole = TensorSpec(spec.dtype, (experts, several * rows, *rest), spec.description)
    run = spec.nbytes if several == 1 else spec.nbytes // rows
    slices = tuple(
        Slice(
            recipe.modules[expert],
            role,
            recipe,
            spec,
            Runs(name, whole.nbytes, several * spec.nbytes * expert + run * index, run, several * run),
        )
        for expert in range(experts)
        for index, recipe in enumerate(recipes)
    )
    return Stack(name, whole, slices)
