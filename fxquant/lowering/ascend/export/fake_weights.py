"""Fake weights of an emitted module: dtypes, shapes and strides, without reading a file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fxquant.program.program import Program, made_parameters
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import tensor_specs


def fake_weights(
    program: Program, blocks: Mapping[str, tuple[str, Mapping[str, Any]]], dtype: torch.dtype, mode: FakeTensorMode
) -> dict[str, dict[str, Tensor]]:
    """The weights that `Model.load` returns, on CPU, for the `BLOCKS` of the module emitted for `program`."""
    stored = stored_tensors(program)
    return {
        key: {name: _fake(_loaded(stored, entry, prefix, name, dtype), mode) for name, entry in table.items()}
        for key, (prefix, table) in blocks.items()
    }


def stored_tensors(program: Program) -> dict[str, Tensor]:
    """Name in the weight files → its tensor on meta; a tensor that no recipe makes has the graph's dtype."""
    tensors: dict[str, Tensor] = {}
    quantized = {name for recipe in program.recipes.values() for name in made_parameters(recipe)}
    for target, parameter in program.parameters.items():
        if target not in quantized:
            tensor = program.graph.tensor(target)
            shape = tensor.shape[1:] if parameter.stacked else tensor.shape
            tensors |= dict.fromkeys(parameter.names, torch.empty(shape, dtype=tensor.dtype, device="meta"))
    for recipe in program.recipes.values():
        for role, spec in tensor_specs(recipe).items():
            names = [tensor_name(module, role) for module in recipe.modules]
            tensors |= dict.fromkeys(names, torch.empty(spec.shape, dtype=spec.dtype, device="meta"))
    return tensors


def _loaded(stored: Mapping[str, Tensor], entry: Any, prefix: str, key: str, dtype: torch.dtype) -> Tensor:
    """The tensor as the module's `load_table` makes it; all experts of a stack have the shape of the first."""
    experts = entry.experts
    first, count = ("0", experts) if isinstance(experts, int) else (experts[0], len(experts))
    names = [(name if entry.absolute else prefix + name).format(first) for name in entry.names or (key,)]
    tensor = entry.layout(dtype, *(stored[name] for name in names))
    return tensor.new_empty((count, *tensor.shape)) if count else tensor


def _fake(tensor: Tensor, mode: FakeTensorMode) -> Tensor:
    with mode:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
