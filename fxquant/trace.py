"""Module on meta → torch.fx graph in the `fxq::` dialect, by running its forward once under torch.export."""

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.overrides import TorchFunctionMode

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
    example = _example(model, BATCH, SEQUENCE, PAST)
    batch, sequence, total, length = Dim("batch"), Dim("sequence"), Dim("total"), Dim("past")
    shapes = (
        {0: batch, 1: sequence},
        {0: batch, 1: total},
        {0: batch, 1: sequence},
        [{0: batch, 1: length}] * model.config.num_hidden_layers,
    )
    try:
        with torch.no_grad(), torch.device("meta"):
            _check_one_path(model)
            exported = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
            return _without_writes(exported)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise FxquantError(
            type(model).__name__,
            f"its forward cannot be traced: {type(error).__name__}: {first}",
            "Keep shapes and control flow free of tensor values; put data-dependent parts behind an fxq:: operator.",
        ) from error


def _example(model: DeepseekV3, batch: int, sequence: int, past: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    with torch.device("meta"):
        ids = torch.zeros(batch, sequence, dtype=torch.int64)
        mask = torch.zeros(batch, sequence + past, dtype=torch.int64)
        width = model.config.kv_lora_rank + model.config.qk_rope_head_dim
        return ids, mask, ids.clone(), [torch.zeros(batch, past, width) for _ in range(model.config.num_hidden_layers)]


class _Calls(TorchFunctionMode):
    """Records the torch functions that a forward calls."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def _check_one_path(model: DeepseekV3) -> None:
    """torch.export takes sizes for two or more, so a branch on an empty cache or a single token leaves no trace."""
    paths = []
    for batch, sequence, past in ((BATCH, SEQUENCE, PAST), (1, 1, PAST), (BATCH, SEQUENCE, 0)):
        with _Calls() as calls:
            model(*_example(model, batch, sequence, past))
        paths.append(calls.functions)
    if any(path != paths[0] for path in paths):
        raise ValueError("it takes another path for a single token or an empty cache")


def _without_writes(exported: ExportedProgram) -> ExportedProgram:
    """In-place calls on tensors of its own as out-of-place ones; most models have none."""
    schemas = (getattr(node.target, "_schema", None) for node in exported.graph.nodes)
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        return exported
    exported = exported.run_decompositions({})
    if any(spec.kind != OutputKind.USER_OUTPUT for spec in exported.graph_signature.output_specs):
        raise ValueError("it writes into its inputs or parameters")
    return exported


def _with_get_attr(exported: ExportedProgram, model: nn.Module) -> tuple[fx.GraphModule, dict[str, str]]:
    """The exported graph with parameters as `get_attr` nodes; target → path in the model."""
    state = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    first = {id(tensor): path for path, tensor in reversed(state.items())}
    root, targets = nn.Module(), {}  # type: nn.Module, dict[str, str]
    graph = exported.graph
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in list(graph.find_nodes(op="placeholder")):
        spec = specs[node.name]
        if spec.kind == InputKind.USER_INPUT:
            continue
        if spec.target not in state:
            fact = "a constant tensor made in the forward or in __init__."
            raise FxquantError(spec.target, fact, "Make it a parameter.")
        path = first[id(state[spec.target])]  # a module that several layers share has one name in the checkpoint
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


TORCH_KINDS = {nn.RMSNorm: Kind.NORM, nn.LayerNorm: Kind.NORM, nn.Embedding: Kind.EMBEDDING}
"""What torch's own modules are."""


def _kind(model: nn.Module, path: str) -> Kind:
    """What the module at `path` is: its own `kind` or the nearest ancestor's."""
    while path:
        module = model.get_submodule(path)
        kind = getattr(module, "kind", TORCH_KINDS.get(type(module)))
        if kind is not None:
            return Kind(kind)
        path = path.rpartition(".")[0]
    return Kind.OTHER


def _annotate(program: Program, model: nn.Module) -> None:
    """Give every node its module path, kind and block."""
    layers, modules = _layers(model), {path for path, _ in model.named_modules(remove_duplicate=False)}
    nodes = list(program.graph.graph.nodes)
    for node in nodes:
        path = _owner_path(node, modules) if node.op == "get_attr" else _module_path(node.meta, modules)
        block = next((layer for layer in layers if path == layer or path.startswith(layer + ".")), "")
        node.meta |= {"module": path, "kind": _kind(model, path), "block": block}
        node.meta.pop("nn_module_stack", None)
    _name_outside_blocks([node for node in nodes if node.op == "call_function"])
    for node in nodes:
        node.meta["block"] = node.meta["block"] or "before"


def _owner_path(node: fx.Node, modules: set[str]) -> str:
    """The module that holds a parameter; a stack of experts is held by the module above its name."""
    path = str(node.target).rpartition(".")[0]
    return path if path in modules else path.rpartition(".")[0]


def _layers(model: nn.Module) -> list[str]:
    """Paths of the repeated layers: the members of every outermost module list, in order."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    outermost = [path for path in lists if not any(path.startswith(other + ".") for other in lists)]
    return [f"{path}.{index}" for path in outermost for index in range(len(model.get_submodule(path)))]  # type: ignore[arg-type]


def _name_outside_blocks(calls: list[fx.Node]) -> None:
    """Each run of calls outside the layers is a block of its own: before, between, between_1, …, after."""
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
    """The innermost module of the stack that is a module of the model; some nodes carry placeholders of torch's."""
    stack = [path for path, _ in (meta.get("nn_module_stack") or {}).values()]
    return next((path for path in reversed(stack) if path in modules), "")
