"""A tiny model's graph under a policy, and what a module got."""

from collections.abc import Callable

from tiny import float_program

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.passes import AssignSchemes
from fxquant.policy.policy import Policy, load_policy
from fxquant.program.program import Program

Assign = Callable[..., Program]


def assigner(tiny: Callable[..., Checkpoint]) -> Assign:
    """`assign(policy, fp8=True)`: the float graph of a tiny model with its schemes assigned."""

    def assigned(policy: str | Policy, mtp: tuple[str, ...] = (), **options: object) -> Program:
        program = float_program(tiny(**options))
        AssignSchemes(load_policy(policy) if isinstance(policy, str) else policy, mtp)(program)
        return program

    return assigned


def scheme_of(program: Program, module: str) -> str:
    """As a recipe carries it; FLOAT without one."""
    recipe = program.recipes.get(f"model.layers.{module}")
    if recipe is None:
        return "FLOAT"
    return recipe.scheme + (f" group_size {recipe.group_size}" if recipe.group_size else "")
