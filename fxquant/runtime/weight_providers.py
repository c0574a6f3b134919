"""Weight readers: disk name → tensor, from a checkpoint, from recipes over it, or from a written weight file.

A graph parameter is loaded through one of them; a stack of experts stays on disk and yields one expert at a time.
Kernels, and with them numba, are imported when a tensor is made: code that only reads graphs does not need them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.kernels.pack_int4 import pack_int4, unpack_blocks
from fxquant.program.program import Program
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs

Read = Callable[[str], Tensor]


class Stack(Protocol):
    """What operators use of a stacked parameter: its length and one expert's tensor."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int) -> Tensor: ...


class Codes(Protocol):
    """Source of the GPTQ codes of a module."""

    def __call__(self, module: str) -> Tensor:
        """int8 [n, k]."""

    def digest(self, module: str) -> str:
        """XXH3-128 of their bytes, in hex."""


class LazyStack:
    """The tensors of all experts of a layer, each read on access."""

    def __init__(self, names: tuple[str, ...], read: Read) -> None:
        self._names, self._read = names, read

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, expert: int) -> Tensor:
        return self._read(self._names[expert])

    def __iter__(self) -> Iterator[Tensor]:
        return (self[expert] for expert in range(len(self)))


CPU = torch.device("cpu")


def load(
    program: Program, target: str, read: Read, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Tensor | LazyStack:
    """The value of a graph parameter on `device`; floating-point tensors as `dtype`, int4 codes packed."""
    parameter = program.parameters[target]
    recipe = program.recipes.get(parameter.module)
    unpacked = parameter.role == "weight" and recipe is not None and recipe.int4 and not recipe.weight_format.packed

    def converted(name: str) -> Tensor:
        tensor = read(name)
        # some engines store a code per byte, others pack along k; operators take pairs of rows
        if unpacked and tensor.dtype is torch.uint8:
            return pack_int4(unpack_blocks(tensor)).to(device)
        if unpacked and tensor.dtype is torch.int8:
            return pack_int4(tensor).to(device)
        tensor = tensor.to(device)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return LazyStack(parameter.names, converted) if parameter.stacked else converted(parameter.names[0])


class RecipeWeights:
    """Makes the tensors of the weight file from the checkpoint, module by module, without writing them.

    `codes`: source of the codes that calibration found.
    """

    def __init__(self, program: Program, checkpoint: Checkpoint, codes: Codes | None = None) -> None:
        self._checkpoint, self._codes = checkpoint, codes
        self._owners: dict[str, tuple[Recipe, str, str]] = {
            tensor_name(module, role): (recipe, module, role)
            for recipe in program.recipes.values()
            for module in recipe.modules
            for role in tensor_specs(recipe)
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def __call__(self, name: str) -> Tensor:
        if name not in self._owners:
            return self._checkpoint.read(name)
        recipe, module, role = self._owners[name]
        if self._last[0] != module:  # a module's tensors are made together and read one after the other
            self._last = (module, make_module(recipe, module, self._checkpoint.read, self._codes))
        return self._last[1][role]


def make_module(recipe: Recipe, module: str, read: Read, codes: Codes | None = None) -> dict[str, Tensor]:
    """All tensors of one of `recipe.modules`, by role."""
    from fxquant.kernels.module_tensors import make_tensors

    weight, bias = tensor_name(module, "weight"), tensor_name(module, "bias")
    solved = codes_of(recipe, module, codes)
    return make_tensors(recipe, weight, read(weight), read(bias) if recipe.bias else None, solved)


def codes_of(recipe: Recipe, module: str, codes: Codes | None) -> Tensor | None:
    """The codes that calibration found for a module; None if the recipe does not use them."""
    if not recipe.algorithm.from_inputs:
        return None
    if codes is None:
        raise FxquantError(f"layer {module}", "its codes come from calibration, but none ran.", "Pass --calib TEXT.")
    return codes(module)


class RoundedWeights:
    """Reads the checkpoint, with every weight that has a recipe rounded to the values of its integers."""

    def __init__(self, program: Program, read: Read) -> None:
        self._read = read
        self._recipes = {name: recipe for recipe in program.recipes.values() for name in recipe.weight_names}

    def __call__(self, name: str) -> Tensor:
        from fxquant.kernels.module_tensors import rounded_weight

        tensor = self._read(name)
        recipe = self._recipes.get(name)
        return tensor if recipe is None else rounded_weight(recipe, tensor)


class Cached:
    """Keeps the most recently read tensors, up to `limit` bytes, for graphs that run many times."""

    def __init__(self, read: Read, limit: int = 1 << 30) -> None:
        self._read, self._limit = read, limit
        self._cached: OrderedDict[str, Tensor] = OrderedDict()
        self._bytes = 0

    def __call__(self, name: str) -> Tensor:
        if name in self._cached:
            self._cached.move_to_end(name)
            return self._cached[name]
        tensor = self._read(name)
        if tensor.is_floating_point() and tensor.dtype is not torch.float32:
            tensor = tensor.float()
        self._cached[name] = tensor
        self._bytes += tensor.nbytes
        while self._bytes > self._limit and len(self._cached) > 1:  # one tensor may exceed the limit alone
            self._bytes -= self._cached.popitem(last=False)[1].nbytes
        return tensor
