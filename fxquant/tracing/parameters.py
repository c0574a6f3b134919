"""Graph parameters: a meta tensor for each, and the checkpoint tensors behind it."""

from collections.abc import Callable

import torch
from torch import nn

from fxquant.models.layers import RoutedExperts
from fxquant.program.graph import ProgramGraph
from fxquant.program.program import Parameter
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.tracing.annotate import kinds
from fxquant.tracing.calls import model_state

Names = Callable[[str], str]
"""Path of a parameter in the model → its name in the checkpoint."""


def attach_parameters(
    root: ProgramGraph, model: nn.Module, checkpoint_name: Names | None = None
) -> dict[str, Parameter]:
    """Give `root` the tensors that the graph reads. Targets, and modules of calls, get their checkpoint names."""
    modules, state = dict(model.named_modules(remove_duplicate=False)), model_state(model)
    kind, renamed = kinds(modules), {}  # type: Callable, dict[str, str]
    parameters: dict[str, Parameter] = {}
    for node in root.graph.find_nodes(op="get_attr"):
        path = node.target
        holder, name = module_and_role(path)
        owner = modules[holder]
        if isinstance(owner, RoutedExperts):
            names = tuple(map(checkpoint_name or str, owner.checkpoint_names(holder, name)))
            stack = _stack_path(names) if checkpoint_name else path
            node.target = tensor_name(stack, "weight")
            parameter = Parameter(names, stack, kind(holder), "weight", stacked=True)
            renamed[holder] = stack.rpartition(".")[0]
        else:
            node.target = checkpoint_name(path) if checkpoint_name else path
            renamed[holder], role = module_and_role(node.target)
            parameter = Parameter((node.target,), renamed[holder], kind(holder), role)
        root.tensors[node.target] = torch.empty_like(state[path], device="meta")
        parameters[node.target] = parameter
    for node in root.graph.nodes:
        node.meta["module"] = renamed.get(node.meta.get("module", ""), node.meta.get("module", ""))
    return parameters


def _stack_path(names: tuple[str, ...]) -> str:
    """`layer.experts.gate_proj` for `layer.experts.0.gate_proj.weight`, `layer.experts.1.…`: what they share."""
    first, last = names[0].split(".")[:-1], names[-1].split(".")[:-1]
    if first == last:
        return ".".join(part for part in first if not part.isdigit())
    return ".".join(part for part, other in zip(first, last, strict=True) if part == other)
