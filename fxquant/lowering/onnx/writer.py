"""ONNX writer, program → model.onnx: the fx graph node by node, weights by reference to the weight files beside it."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import fx

from fxquant import ops
from fxquant.engines.onnx_cache import OnnxCache
from fxquant.engines.onnx_form import OnnxForm
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.blocks import BlockProducts
from fxquant.lowering.onnx.builder import CONTRIB, DOMAIN, IR_VERSION, OPSET, Builder
from fxquant.lowering.onnx.deployment import deployment
from fxquant.lowering.onnx.description import Provenance, described
from fxquant.lowering.onnx.experts import Experts
from fxquant.lowering.onnx.function_table import FunctionTable
from fxquant.lowering.onnx.initializers import Blocks, Initializers, View
from fxquant.lowering.onnx.last_logits import KEPT, NAME, Head, count_input, find_head, keep_last
from fxquant.lowering.onnx.node_lowering import NodeLowering
from fxquant.lowering.onnx.regions import Region, find_regions
from fxquant.lowering.onnx.shapes import FIRST_CACHE, Meta, Shapes
from fxquant.program.node_names import operator_name
from fxquant.program.program import Program
from fxquant.storage.safetensors import TensorInfo
from fxquant.version import __version__

FILE = "model.onnx"
ACCURACY_LEVEL = "accuracy_level"
"""Metadata key, in profiles with operators of onnxruntime's own."""


def write_onnx(
    program: Program, tensors: Mapping[str, TensorInfo], folder: Path, form: OnnxForm = OnnxForm(),
    provenance: Provenance = Provenance(),
) -> Path:  # fmt: skip
    """Write `folder/model.onnx` and return its path.

    tensors  name on disk → its place; every file is in `folder`, and the model refers to its bytes
    inputs   input_ids, attention_mask, position_ids int64; past_key_values.{i}.latent float32 [batch, past, width],
             or past_key_values.{i}.key and .value [batch, heads, past, width], as `form.cache` says
             and, if `form.last_logits`, num_logits_to_keep int64 []: of the last tokens, 0 of all
    outputs  logits float32 [batch, sequence, vocabulary], present.{i}.latent [batch, total, width], and so on

    Inner values have the names of the fx nodes. Raises FxquantError for an operator that has no ONNX form.
    """
    model = build_model(deployment(program, form).program, tensors, form)
    proto = ir.to_proto(described(model, provenance))
    path, partial = folder / FILE, folder / f"{FILE}.partial"
    partial.write_bytes(proto.SerializeToString(deterministic=True))
    partial.replace(path)
    return path


def build_model(program: Program, tensors: Mapping[str, TensorInfo], form: OnnxForm) -> ir.Model:
    """The model of a program that was deployed for `form`, in memory; no weight is read."""
    shapes, functions, initializers = Shapes(program), FunctionTable(form.inline), Initializers(tensors)

    def parameter(node: fx.Node, view: View | Blocks) -> ir.Value:
        stored = program.parameters[str(node.target)]
        if stored.stacked:
            fact = "has one tensor per expert, but is read outside the experts."
            raise FxquantError(str(node.target), fact, "Read it only inside the experts.")
        return initializers.get(stored.names[0], view)

    lowering = NodeLowering(Builder(), functions, parameter, shapes, named=True)
    experts, blocks = Experts(program, initializers, functions), BlockProducts(program, initializers)
    regions = list(find_regions(program, shapes))
    inside = {node: region for region in regions for node in region.nodes}
    head, count = find_head(program, shapes) if form.last_logits else None, count_input()
    for node in head.calls if head is not None else ():
        shapes.rename(node, "sequence", KEPT)
    inputs: list[ir.Value] = []
    outputs: list[ir.Value] = []
    for node in program.graph.graph.nodes:
        if node.op == "placeholder":
            inputs.append(_input(node, _name(node, len(inputs), form.cache), shapes[node]))
            lowering.values[node] = inputs[-1]
        elif node.op == "output":
            outputs = _outputs(lowering, program, form.cache)
        elif node.op == "call_function" and not blocks.lower(lowering, node):
            _lower(lowering, experts, node, inside.get(node))
        if head is not None and node is head.hidden:
            _keep_last(lowering, head, count)
    domains = {DOMAIN: not form.inline, CONTRIB: form.profile.contrib}
    graph = ir.Graph(
        inputs if head is None else [*inputs, count],
        outputs,
        nodes=lowering.builder.nodes,
        initializers=initializers.values,
        opset_imports={"": OPSET} | {domain: 1 for domain, used in domains.items() if used},
        name="fxquant",
    )
    notes = {"producer": "fxquant", "profile": form.profile.value, "cache": form.cache.value}
    notes |= {"last_logits": str(form.last_logits).lower(), "inline": str(form.inline).lower()}
    notes |= {"operators": _census(program), "numerics": form.numerics}
    notes |= {ACCURACY_LEVEL: str(form.accuracy_level.value)} if form.profile.contrib else {}
    return ir.Model(
        graph,
        ir_version=IR_VERSION,
        producer_name="fxquant",
        producer_version=__version__,
        functions=functions.functions,
        metadata_props=notes,
    )


def _lower(lowering: NodeLowering, experts: Experts, node: fx.Node, region: Region | None) -> None:
    if region is not None:
        if node is region.output:
            experts.region(lowering, region)
    elif node.target == ops.moe_experts:
        experts.node(lowering, node)
    else:
        lowering.lower(node)


def _keep_last(lowering: NodeLowering, head: Head, count: ir.Value) -> None:
    """What the calls of `head` read from here on."""
    name, meta = head.hidden.name, lowering.shapes[head.hidden]
    lowering.builder.enter(f"{name}/{NAME}/")
    kept = keep_last(lowering.builder, lowering.values[head.hidden], count)
    kept.dtype, kept.shape = meta.onnx_dtype, ir.Shape(["batch", KEPT, *meta.shape[2:]])
    kept.metadata_props["fx"] = name
    lowering.values[head.hidden] = kept


def _census(program: Program) -> str:
    counts = Counter(operator_name(node) for node in program.graph.graph.nodes if node.op == "call_function")
    counts.pop("getitem", None)
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def _name(node: fx.Node, index: int, cache: OnnxCache) -> str:
    """Of the input with that index."""
    return node.name if index < FIRST_CACHE else f"past_key_values.{_part(index - FIRST_CACHE, cache)}"


def _part(index: int, cache: OnnxCache) -> str:
    """Layer and part of the cache tensor with that index."""
    layer, part = divmod(index, len(cache.parts))
    return f"{layer}.{cache.parts[part]}"


def _input(node: fx.Node, name: str, meta: Meta) -> ir.Value:
    """A graph input; `fx` in its metadata is the placeholder's name."""
    return ir.Value(name=name, shape=meta.shape, type=ir.TensorType(meta.onnx_dtype), metadata_props={"fx": node.name})


def _outputs(lowering: NodeLowering, program: Program, cache: OnnxCache) -> list[ir.Value]:
    results = []
    for index, output in enumerate(program.graph.results):
        name = "logits" if index == 0 else f"present.{_part(index - 1, cache)}"
        value = lowering.value(output)
        if any(other.name == name and other is not output for other in program.graph.graph.nodes):
            raise FxquantError(name, "a node has the name of this output.", "Rename the module or attribute.")
        if value.name != name:
            lowering.builder.enter(f"{name}/")
            value = lowering.builder.op("Identity", value)
            value.name = name
        meta = lowering.shapes[output]
        value.dtype, value.shape = meta.onnx_dtype, meta.shape
        results.append(value)
    return results
