"""Graph export: a module on meta → a torch.fx graph in the `fxq::` dialect, by torch.export of its forward.

Equal layers are traced once: the graph of a model with one layer of each kind is stamped to full depth.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import UserError
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.gc_pause import uncollected
from fxquant.program.graph import ProgramGraph
from fxquant.program.node_names import name_nodes
from fxquant.program.program import Program
from fxquant.tracing.annotate import annotate, name_modules
from fxquant.tracing.calls import Log, Recorder, first_difference, model_state, outermost_lists
from fxquant.tracing.canonical import canonicalize, order_parameters
from fxquant.tracing.inputs import Inputs, check_dynamic, standard_inputs
from fxquant.tracing.layers import NotRepeatedError, confirm, plan_layers, shortened, split
from fxquant.tracing.no_stack_traces import without_stack_traces
from fxquant.tracing.parameters import Names, attach_parameters
from fxquant.tracing.stamp import stamp
from fxquant.tracing.undeclared import undeclared

OTHERS = "a single token, an empty cache or long inputs"
RULE = "Keep shapes and control flow free of tensor values; put data-dependent parts behind an fxq:: operator."


def trace(
    model: nn.Module, checkpoint: Checkpoint, inputs: Inputs | None = None, checkpoint_name: Names | None = None
) -> Program:
    """Trace prefill and cached decode as one graph with dynamic batch, sequence and past.

    Only headers are read: parameters stay on meta, and `Program.parameters` says which checkpoint tensors each one is.
    `inputs` are the arguments to trace with, by default those of `DeepseekV3`; `checkpoint_name` maps the path of a
    parameter to its checkpoint name if they differ. Raises FxquantError if the forward cannot be traced.
    """
    with uncollected():
        return _traced(model, checkpoint, inputs, checkpoint_name)


def _traced(model: nn.Module, checkpoint: Checkpoint, inputs: Inputs | None, checkpoint_name: Names | None) -> Program:
    given = inputs or standard_inputs(_config(model), _config(model).num_hidden_layers)
    with _traceable(model):
        logs = _runs(model, given)
    # declared inputs have a cache for each layer, so they fit only the full depth
    graph = (None if inputs else _stamped(model, logs)) or _whole(model, given, logs)
    check_dynamic(graph)
    if inputs is None:
        _check_logits(graph, model)
    order_parameters(graph)
    annotate(graph, model)
    root = ProgramGraph(graph)
    parameters = attach_parameters(root, model, checkpoint_name)
    names = name_nodes(graph)
    root.lint()
    return Program(root, dict(checkpoint.config), checkpoint.dtype, parameters, names=names)


def _check_logits(graph: fx.Graph, model: nn.Module) -> None:
    ids = next(iter(graph.find_nodes(op="placeholder")))
    logits = graph.output_node().all_input_nodes[0]
    shape = tuple(getattr(logits.meta["val"], "shape", ()))
    if len(shape) != 3 or shape[:2] != tuple(ids.meta["val"].shape):
        sizes = [size if isinstance(size, int) else "…" for size in shape]
        fact = f"its first result is [{', '.join(map(str, sizes))}], not logits [batch, sequence, vocabulary]."
        raise FxquantError(
            type(model).__name__, fact, "Return the logits of every position: engines choose those they need."
        )


@contextmanager
def _traceable(model: nn.Module) -> Iterator[None]:
    """Run the model without memory for values; any exception becomes the reason why it cannot be traced."""
    try:
        with torch.no_grad(), torch.device("meta"):
            yield
    except FxquantError:
        raise
    except Exception as error:
        fact = f"its forward cannot be traced: {type(error).__name__}: {_first_line(error)}"
        raise FxquantError(type(model).__name__, fact, RULE) from error


def _reason(error: Exception) -> str:
    named = re.search(r"aten::\w+|torch\.\w+\(\)", str(error)) if isinstance(error, NotImplementedError) else None
    return (
        f"the size of what {named[0]} gives depends on values"
        if named
        else f"{type(error).__name__}: {_first_line(error)}"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]


def _runs(model: nn.Module, inputs: Inputs) -> list[Log]:
    """One log per run of `inputs`. torch.export assumes sizes of two or more, so a branch on an empty cache or a single
    token would go unnoticed."""
    recorder, logs = Recorder(model), []  # type: Recorder, list[Log]
    for arguments in inputs.runs:
        logs.append(_run(recorder, model, arguments))
        if logs[-1].functions != logs[0].functions:
            error = _depends(model, [logs[0], logs[-1]], f"takes a different path for {OTHERS}")
            assert error is not None
            raise error
    return logs


def _depends(model: nn.Module, logs: list[Log], what: str) -> FxquantError | None:
    """The error for the first module that computes something else in another run than the first, if one does."""
    path = next((found for log in logs[1:] if (found := first_difference(logs[0], log)) is not None), None)
    return None if path is None else undeclared(path, model.get_submodule(path), what)


def _run(recorder: Recorder, model: nn.Module, arguments: tuple[Any, ...]) -> Log:
    try:
        return recorder.record(arguments)
    except FxquantError:
        raise
    except Exception as error:
        path = recorder.failed_in or ""
        what = f"cannot be traced: {_reason(error)}"
        raise undeclared(path, model.get_submodule(path), what) from error


def _config(model: nn.Module) -> DeepseekV3Config:
    config = getattr(model, "config", None)
    if not isinstance(config, DeepseekV3Config):
        raise FxquantError(
            type(model).__name__, "has no config.", "Set self.config to the DeepseekV3Config it is given."
        )
    return config


def _stamped(model: nn.Module, logs: list[Log]) -> fx.Graph | None:
    """The graph stamped from one layer of each kind; None if the whole model must be traced."""
    try:
        with _traceable(model):
            return _from_representatives(model, logs)
    except FxquantError:  # a forward made for its own depth may fail in any way with fewer layers
        return None


def _from_representatives(model: nn.Module, logs: list[Log]) -> fx.Graph:
    lists = outermost_lists(model)
    if len(lists) != 1:
        raise NotRepeatedError("the layers are not one list")
    path, layers = next(iter(lists.items()))
    if len(layers) != _config(model).num_hidden_layers:
        raise NotRepeatedError("there is not one latent cache for each layer")
    full = [split(log, path, len(layers)) for log in logs]
    plan = plan_layers(layers, path, full)
    depth = len(plan.representatives)
    inputs = standard_inputs(_config(model), depth)
    with shortened(layers, plan.representatives):
        # a forward may depend on its depth: the short model must make the calls that the full one made
        plan = confirm(plan, full, [split(log, path, depth) for log in _runs(model, inputs)])
        graph = _graph(_exported(model, inputs), model)
    return stamp(graph, plan)


def _whole(model: nn.Module, inputs: Inputs, logs: list[Log]) -> fx.Graph:
    with _traceable(model):
        try:
            exported = _exported(model, inputs)
        except UserError as error:
            named = _depends(model, logs, f"computes with other numbers for {OTHERS}")
            if named is None:
                raise
            raise named from error
    return _graph(exported, model)


def _exported(model: nn.Module, inputs: Inputs) -> ExportedProgram:
    """Without calls in place."""
    # torch's cache of fake results checks each entry that has a symbolic size: twice the time of computing it anew
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), without_stack_traces():
        exported = torch.export.export(model, inputs.runs[0], dynamic_shapes=inputs.dynamic_shapes, strict=False)
        return _without_writes(exported, model) if _writes(exported) else exported


def _writes(exported: ExportedProgram) -> bool:
    schemas = (getattr(node.target, "_schema", None) for node in exported.graph.nodes)
    return any(schema is not None and schema.is_mutable for schema in schemas)


def _without_writes(exported: ExportedProgram, model: nn.Module) -> ExportedProgram:
    """Replace in-place calls on the forward's own tensors by out-of-place ones."""
    exported = exported.run_decompositions({})
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            path, _, name = str(spec.target).rpartition(".")
            raise undeclared(path, model.get_submodule(path), f"writes into its buffer {name} in place")
        if spec.kind != OutputKind.USER_OUTPUT:
            raise ValueError("it writes into its inputs or parameters")
    return exported


def _graph(exported: ExportedProgram, model: nn.Module) -> fx.Graph:
    """The exported graph in the dialect, with a parameter as a `get_attr` node whose target is its path."""
    graph = exported.graph
    regions = sorted({str(node.target) for node in graph.nodes if isinstance(node.target, HigherOrderOperator)})
    if regions:
        fact = f"its forward has a region of its own, {', '.join(regions)}: torch.autocast, no_grad or a control flow."
        raise FxquantError(type(model).__name__, fact, "Compute without it: cast where you want another dtype.")
    graph.owning_module = None  # its parameters have other names
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    state = model_state(model)
    first = {id(tensor): path for path, tensor in reversed(state.items())}
    for node in list(graph.find_nodes(op="placeholder")):
        if specs[node.name].kind == InputKind.USER_INPUT:
            continue
        target = str(specs[node.name].target)
        if target not in state:
            fact = "is a constant tensor made in the forward or in __init__."
            raise FxquantError(target, fact, "Make it a parameter.")
        if specs[node.name].persistent is False and node.users:
            fact = "is a buffer that is not saved: a graph has parameters of the checkpoint only."
            raise FxquantError(target, fact, "Compute it in the forward from Python numbers, or make it a parameter.")
        path = first[id(state[target])]  # a module shared by several layers has one name in the checkpoint
        with graph.inserting_before(node):
            attribute = graph.create_node("get_attr", path, name=node.name)
        attribute.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(attribute)
        graph.erase_node(node)
    name_modules(graph, model)
    canonicalize(graph)
    return graph
