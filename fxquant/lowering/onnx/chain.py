"""Chain of blocks: an emitted model block by block, each on what the ones before it returned.

The operators are those that a session of the whole model runs, but the weights of one block alone are in memory.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from fxquant.lowering.onnx.extract import WholeModel, load_session, outside_reads
from fxquant.lowering.onnx.runner import FILE


class BlockChain:
    """`folder/model.onnx`; `blocks`: the names of the fx nodes of each block, in the order in which they run."""

    def __init__(self, folder: Path, blocks: Mapping[str, Iterable[str]]) -> None:
        self._folder = folder
        self._model = onnx.load(folder / FILE, load_external_data=False)
        self._whole = WholeModel(self._model)
        owner = {node: block for block, nodes in blocks.items() for node in nodes}
        self._nodes: dict[str, list[NodeProto]] = {block: [] for block in blocks}
        for node in self._model.graph.node:
            block = owner.get(node.name.partition("/")[0])
            if block is not None:  # no block has the copies of results under the names of outputs
                self._nodes[block].append(node)
        self._reads = {block: outside_reads(nodes) for block, nodes in self._nodes.items()}
        self._values: dict[str, np.ndarray] = {}

    def run(self, block: str, inputs: Mapping[str, Any], results: Iterable[str] = ()) -> dict[str, Tensor]:
        """Run the next block.

        inputs   placeholder of the fx graph → its value, for those that the block reads
        results  fx nodes of the block whose values to return, beside those that later blocks read
        """
        reads = [name for name in self._reads.pop(block) if name not in self._whole.initializers]
        later = {name for names in self._reads.values() for name in names} | set(results)
        made = {output for node in self._nodes[block] for output in node.output}
        outputs = sorted(made & later)
        session = load_session(self._part(block, reads, outputs), self._folder)
        feeds = {name: self._feed(name, inputs) for name in reads}
        values = dict(zip(outputs, session.run(outputs, feeds), strict=True)) if outputs else {}
        self._values = {name: value for name, value in (self._values | values).items() if name in later}
        return {name: torch.from_numpy(values[name]) for name in results}

    def _feed(self, name: str, inputs: Mapping[str, Any]) -> np.ndarray:
        given = inputs[self._whole.placeholders[name]] if name in self._whole.placeholders else self._values[name]
        return given.contiguous().numpy() if isinstance(given, Tensor) else given

    def _part(self, block: str, reads: list[str], outputs: list[str]) -> ModelProto:
        part, whole = ModelProto(), self._model
        part.ir_version = whole.ir_version
        part.opset_import.extend(whole.opset_import)
        part.functions.extend(whole.functions)
        part.graph.name = block
        part.graph.node.extend(self._nodes[block])
        part.graph.input.extend(self._whole.typed(name, name) for name in reads)
        part.graph.output.extend(self._whole.typed(name, name) for name in outputs)
        used = set(outside_reads(self._nodes[block]))
        part.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in used)
        return part
