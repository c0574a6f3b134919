"""Node annotation: the module that made each node, that module's kind, and its block."""

from collections.abc import Callable
from functools import cache
from itertools import accumulate, groupby
from typing import Any

from torch import fx, nn

from fxquant.policy.kinds import Kind
from fxquant.schemes.roles import module_and_role
from fxquant.tracing.calls import layer_paths

TORCH_KINDS = {nn.RMSNorm: Kind.NORM, nn.LayerNorm: Kind.NORM, nn.Embedding: Kind.EMBEDDING}
"""Kinds of torch's own modules."""


def name_modules(graph: fx.Graph, model: nn.Module) -> None:
    """Reduce the metadata of torch.export to `val` and `module`, the path of the innermost module that ran."""
    modules = {path for path, _ in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        module = _module_path(node.meta, modules)
        node.meta = {key: node.meta[key] for key in ("val",) if key in node.meta} | {"module": module}


def annotate(graph: fx.Graph, model: nn.Module) -> None:
    """Give every node its kind and block; parameters, whose targets are still paths, also their module."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers, kind = set(layer_paths(model)), kinds(modules)
    for node in graph.nodes:
        if node.op == "get_attr":
            node.meta["module"] = module_and_role(str(node.target))[0]
        module = node.meta["module"]
        node.meta |= {"kind": kind(module), "block": _block(module, layers)}
    _name_outside_blocks([node for node in graph.nodes if node.op == "call_function"])
    for node in graph.nodes:
        node.meta["block"] = node.meta["block"] or "before"


def kinds(modules: dict[str, nn.Module]) -> Callable[[str], Kind]:
    """Path of a module → its kind: its own `kind` or the nearest ancestor's."""

    @cache
    def kind(path: str) -> Kind:
        if not path:
            return Kind.OTHER
        module = modules[path]
        own = getattr(module, "kind", TORCH_KINDS.get(type(module)))
        return kind(path.rpartition(".")[0]) if own is None else Kind(own)

    return kind


def _block(module: str, layers: set[str]) -> str:
    """The layer at or above a module path, "" outside of layers."""
    return next((path for path in accumulate(module.split("."), "{}.{}".format) if path in layers), "")


def _name_outside_blocks(calls: list[fx.Node]) -> None:
    """Each run of calls outside the layers is a separate block: before, between_0, between_1, …, after."""
    runs = [list(run) for _, run in groupby(calls, key=lambda node: node.meta["block"])]
    between = 0
    for index, run in enumerate(runs):
        if run[0].meta["block"]:
            continue
        name = "before" if index == 0 else "after" if index == len(runs) - 1 else f"between_{between}"
        between += name.startswith("between")
        for node in run:
            node.meta["block"] = name


def _module_path(meta: dict[str, Any], modules: set[str]) -> str:
    """The innermost module of the stack that belongs to the model; some entries are torch's placeholders."""
    stack = [path for path, _ in (meta.get("nn_module_stack") or {}).values()]
    return next((path for path in reversed(stack) if path in modules), "")
