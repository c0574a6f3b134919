"""Operator extraction: the operators of an emitted model one by one, each on inputs of the caller's choice.

Comparing whole models says little, since a last bit may flip a router's choice. Here every operator gets the inputs
that it has in the fx graph, so that each is checked alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto
from torch import Tensor

from fxquant.lowering.onnx.builder import ZERO_POINT
from fxquant.lowering.onnx.node_lowering import NUMBER
from fxquant.lowering.onnx.runner import FILE, session_options
from fxquant.lowering.onnx.runtime import onnxruntime
from fxquant.processes.memory import return_freed_memory

ROWS = 4096
"""Output features of a large linear that a session computes at a time."""
EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Unit:
    """The ONNX nodes of one fx node; routed experts are one unit, with the name of the fx node of their result.

    inputs   (feed name `<unit>:<index>`, fx node whose value it is), without weights
    outputs  fx nodes that it computes, without sizes, which are Python integers in the fx graph
    """

    name: str
    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]


class OperatorSession:
    """`units` of a model, loaded once. int8 inputs and outputs are int8, although the model carries uint8."""

    def __init__(self, units: tuple[Unit, ...], model: ModelProto, folder: Path) -> None:
        self.units, self._session = units, load_session(model, folder)
        self._dtypes = {input_.name: input_.type.tensor_type.elem_type for input_ in model.graph.input}

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
        """Feed name → tensor or Python number, for every input of every unit; → fx node → value."""
        arrays = {name: self._array(name, value) for name, value in feeds.items()}
        names = [output.name for output in self._session.get_outputs()]
        return {name: _restored(value) for name, value in zip(names, self._session.run(None, arrays), strict=True)}

    def feeds(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Feeds from the values of an fx graph by node name."""
        return {feed: values[name] for unit in self.units for feed, name in unit.inputs}

    def _array(self, name: str, value: Any) -> np.ndarray:
        array = value.contiguous().numpy() if isinstance(value, Tensor) else np.array([value], dtype=np.int64)
        if self._dtypes[name] != TensorProto.UINT8:
            return array
        return (array.astype(np.int16) + ZERO_POINT).astype(np.uint8)  # int8 + 128 overflows int8


def load_session(model: ModelProto, folder: Path) -> onnxruntime.InferenceSession:
    """A session of a part of the model of `folder`."""
    options = session_options()
    options.add_session_config_entry(EXTERNAL_FOLDER, str(folder))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _restored(array: np.ndarray) -> Tensor:
    if array.dtype == np.uint8:
        array = (array.astype(np.int16) - ZERO_POINT).astype(np.int8)
    return torch.from_numpy(array)


def operator_session(folder: Path, names: Iterable[str]) -> OperatorSession:
    """The units of `folder/model.onnx` for `names`, fx nodes of one block, in graph order.

    fx nodes without their own unit are skipped: getitem, sizes, and all but the last node of routed experts.
    """
    model, parts = _extracted(folder, names)
    return OperatorSession(tuple(part.unit for part in parts), _with(model, parts), folder)


def operator_sessions(folder: Path, names: Iterable[str], most: int) -> Iterator[OperatorSession]:
    """The same in sessions of consecutive units whose weights have at most `most` bytes together, or of one unit."""
    model, parts = _extracted(folder, names)
    sizes = {initializer.name: _place(initializer)[1] for initializer in model.graph.initializer}
    while parts:
        count, held = 0, 0
        for part in parts:
            held += sum(sizes[name] for name in part.initializers)
            if count and held > most:
                break
            count += 1
        together, parts = parts[:count], parts[count:]
        yield OperatorSession(tuple(part.unit for part in together), _with(model, together), folder)


def row_sessions(folder: Path, name: str, weight: str, count: int = ROWS) -> Iterator[OperatorSession]:
    """The unit of a linear without bias by blocks of `count` output features: of its `weight` [n, k] a session has
    these rows alone."""
    model, parts = _extracted(folder, [name])
    model = _with(model, parts)
    (stored,) = (initializer for initializer in model.graph.initializer if initializer.name == weight)
    (offset, length), rows = _place(stored), stored.dims[0]
    for start in range(0, rows, count):
        stored.dims[0] = min(count, rows - start)
        place = {"offset": offset + start * (length // rows), "length": stored.dims[0] * (length // rows)}
        for entry in stored.external_data:
            entry.value = str(place.get(entry.key, entry.value))
        for output in model.graph.output:
            output.type.tensor_type.shape.dim[-1].dim_value = stored.dims[0]
        yield OperatorSession(tuple(part.unit for part in parts), model, folder)


def run_by_rows(folder: Path, name: str, weight: str, inputs: Sequence[Tensor] | Mapping[str, Any]) -> Tensor:
    """The result of such a linear, of all rows of its weight in turn.

    inputs  of its unit, in order; or the values of an fx graph by node name
    """
    blocks = []
    for session in row_sessions(folder, name, weight):
        if isinstance(inputs, Mapping):
            feeds = session.feeds(inputs)
        else:
            feeds = dict(zip((feed for feed, _ in session.units[0].inputs), inputs, strict=True))
        blocks.append(session(feeds)[name])
        del session  # before the next one is made
        return_freed_memory()
    return torch.cat(blocks, -1)


def _place(initializer: TensorProto) -> tuple[int, int]:
    """Offset and length in its file; of none, 0."""
    entries = {entry.key: entry.value for entry in initializer.external_data}
    return int(entries.get("offset", 0)), int(entries.get("length", 0))


def _extracted(folder: Path, names: Iterable[str]) -> tuple[ModelProto, list["_Part"]]:
    """The model without nodes, and the units of `names`."""
    model = onnx.load(folder / FILE, load_external_data=False)
    requested = set(names)
    groups: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        name = node.name.partition("/")[0]
        if name in requested:
            groups.setdefault(name, []).append(node)
    whole = WholeModel(model)
    parts = [part for name, nodes in groups.items() if (part := whole.unit(name, nodes)).outputs]
    nodes = {id(part): [_copy(node) for node in part.nodes] for part in parts}
    del model.graph.node[:], model.graph.input[:], model.graph.output[:], model.graph.value_info[:]
    return model, [replace(part, nodes=nodes[id(part)]) for part in parts]


def _copy(node: NodeProto) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    return copied


def _with(model: ModelProto, parts: list["_Part"]) -> ModelProto:
    """A model of `parts`."""
    chosen = ModelProto()
    chosen.ir_version, chosen.graph.name = model.ir_version, model.graph.name
    chosen.opset_import.extend(model.opset_import)
    chosen.functions.extend(model.functions)
    used: set[str] = set()
    for part in parts:
        chosen.graph.node.extend(part.nodes)
        chosen.graph.input.extend(part.inputs)
        chosen.graph.output.extend(part.outputs)
        used |= part.initializers
    chosen.graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in used)
    return chosen


@dataclass(frozen=True)
class _Part:
    unit: Unit
    nodes: list[NodeProto]
    inputs: list[ValueInfoProto]
    outputs: list[ValueInfoProto]
    initializers: set[str]


class WholeModel:
    """Data of the whole model that its parts need.

    placeholders  input → its fx node
    initializers  their names
    """

    def __init__(self, model: ModelProto) -> None:
        graph = model.graph
        self._types = {info.name: info for info in (*graph.input, *graph.value_info, *graph.output)}
        self.placeholders = dict(_named_by_fx(graph.input))
        self._sources = self.placeholders | dict(_named_by_fx(graph.value_info))
        self.initializers = {initializer.name for initializer in graph.initializer}

    def unit(self, name: str, nodes: list[NodeProto]) -> _Part:
        reads = outside_reads(nodes)
        outside = [read for read in reads if read not in self.initializers]
        feeds = {read: f"{name}:{index}" for index, read in enumerate(outside)}
        outputs = [output for node in nodes for output in node.output if output and self._is_value(output)]
        unit = Unit(name, tuple((feed, self._sources.get(read, read)) for read, feed in feeds.items()), tuple(outputs))
        inputs = [self.typed(read, feed) for read, feed in feeds.items()]
        for node in nodes:
            _rename(node, feeds)
        values = [self.typed(output, output) for output in outputs]
        return _Part(unit, nodes, inputs, values, self.initializers.intersection(reads))

    def _is_value(self, name: str) -> bool:
        return "/" not in name and all(prop.key != NUMBER for prop in self._types[name].metadata_props)

    def typed(self, value: str, name: str) -> ValueInfoProto:
        """Type and rank; dynamic dimensions lose their names, since units are fed independently."""
        typed = ValueInfoProto()
        typed.CopyFrom(self._types[value])
        typed.name = name
        for dim in typed.type.tensor_type.shape.dim:
            if dim.HasField("dim_param"):
                dim.Clear()
        return typed


def outside_reads(nodes: Iterable[NodeProto]) -> list[str]:
    """Names that nodes read from outside themselves, weights included, in order."""
    nodes = list(nodes)
    own = {output for node in nodes for output in node.output}
    return list(dict.fromkeys(read for node in nodes for read in _reads(node) if read not in own))


def _named_by_fx(infos: Iterable[ValueInfoProto]) -> Iterator[tuple[str, str]]:
    """Values that have the name of an fx node in their metadata, and not as their own."""
    return ((info.name, prop.value) for info in infos for prop in info.metadata_props if prop.key == "fx")


def _graphs(node: NodeProto) -> Iterator[GraphProto]:
    return (attribute.g for attribute in node.attribute if attribute.HasField("g"))


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads from outside itself, those of its branches included."""
    yield from (name for name in node.input if name)
    for graph in _graphs(node):
        own = {initializer.name for initializer in graph.initializer} | {
            name for inner in graph.node for name in inner.output
        }
        yield from (name for inner in graph.node for name in _reads(inner) if name not in own)


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    for graph in _graphs(node):
        for inner in graph.node:
            _rename(inner, names)
