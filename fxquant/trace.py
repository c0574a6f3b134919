"""Module on meta → torch.fx graph in the `fxq::` dialect, by running its forward once under torch.export."""

from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind

from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.kinds import Kind
from fxquant.models import DeepseekV3
from fxquant.models.layers import RoutedExperts
from fxquant.naming import name_nodes
from fxquant.program import Parameter, Program, attach
from fxquant.trace_canonical import canonicalize

BATCH, SEQUENCE, PAST = 2, 3, 5
"""Example sizes: distinct and above one, so that none is taken for a constant."""


def trace(model: DeepseekV3, checkpoint: Checkpoint) -> Program:
    """Trace prefill and cached decode as one graph with dynamic batch, sequence and past.

    Nothing is read but headers: parameters stay on meta, and `Program.parameters` says which checkpoint tensors each
    one is. Raises FxquantError where the forward cannot be traced.
    """
    exported = _export(model)
    graph, targets = _with_get_attr(exported, model)
    program = Program(graph, dict(checkpoint.config), checkpoint.dtype)
    _annotate(program, model)
    program.parameters = {target: _parameter(model, path) for target, path in targets.items()}
    canonicalize(program)
    name_nodes(program)
    program.drop_unused_parameters()
    graph.graph.lint()
    graph.recompile()
    return program


def _export(model: DeepseekV3) -> ExportedProgram:
    with torch.device("meta"):
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        mask = torch.zeros(BATCH, SEQUENCE + PAST, dtype=torch.int64)
        width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        past = [torch.zeros(BATCH, PAST, width) for _ in range(model.config.num_hidden_layers)]
    batch, sequence, total, length = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: total},
        {0: batch, 1: sequence},
        [{0: batch, 1: length}] * len(past),
    )
    try:
        with torch.no_grad():
            return torch.export.export(model, (ids, mask, ids.clone(), past), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise FxquantError(
            type(model).__name__,
            f"its forward cannot be traced: {type(error).__name__}: {first}",
            "Keep shapes and control flow free of tensor values; put data-dependent parts behind an fxq:: operator.",
        ) from error


def _with_get_attr(exported: ExportedProgram, model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """The exported graph with parameters as `get_attr` nodes; target → path in the model."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    root, targets = nn.Module(), {}  # type: nn.Module, dict[str, str]
    graph = exported.graph
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in list(graph.find_nodes(op="placeholder")):
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        path = spec.target
        if path not in state:
            raise FxquantError(path, "a constant tensor made in the forward or in __init__.", "Make it a parameter.")
        target = path if _owner(model, path)[1] is None else f"{path}.weight"
        targets[target] = path
        attach(root, target, torch.empty_like(state[path], device="meta"))
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", target, name=node.name)
        attribute.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    return fx.GraphModule(root, graph), targets


def _owner(model: nn.Module, path: str) -> tuple[nn.Module, RoutedExperts | None]:
    """The module that holds parameter `path`, twice if it is a stack of experts."""
    owner = model.get_submodule(path.rpartition(".")[0])
    return owner, owner if isinstance(owner, RoutedExperts) else None


def _parameter(model: nn.Module, path: str) -> Parameter:
    prefix, _, name = path.rpartition(".")
    _, experts = _owner(model, path)
    kind = _kind(model, prefix)
    if experts is None:
        return Parameter((path,), prefix, kind)
    return Parameter(experts.checkpoint_names(prefix, name), path, kind, stacked=True)


def _kind(model: nn.Module, path: str) -> Kind:
    """What the module at `path` is: its own `kind` or the nearest ancestor's."""
    while path:
        kind = getattr(model.get_submodule(path), "kind", None)
        if kind is not None:
            return Kind(kind)
        path = path.rpartition(".")[0]
    return Kind.OTHER


def _annotate(program: Program, model: nn.Module) -> None:
    """Give every node its module path, kind and block."""
    blocks = {
        f"{path}.{index}"
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index in range(len(module))
    }
    current = "before"
    for node in program.graph.graph.nodes:
        path = _module_path(node.meta)
        own = next((block for block in blocks if path == block or path.startswith(block + ".")), None)
        if node.op == "call_function":
            current = own or ("before" if current == "before" else "after")
        node.meta |= {"module": path, "kind": _kind(model, path), "block": current}
        node.meta.pop("nn_module_stack", None)


def _module_path(meta: dict[str, Any]) -> str:
    stack = meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0] if stack else ""
