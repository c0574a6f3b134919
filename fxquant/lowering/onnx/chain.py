"""Chain of blocks: an emitted model block by block, each on what the ones before it returned.

The operators are those that a session of the whole model runs, but the weights of one block alone are in memory.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import ModelProto, NodeProto
from torch import Tensor

from fxquant.lowering.onnx.extract import WholeModel, load_session, outside_reads, run_by_rows
from fxquant.lowering.onnx.runner import FILE
from fxquant.processes.memory import return_freed_memory


class BlockChain:
    """`folder/model.onnx`.

    blocks  the names of the fx nodes of each block, in the order in which they run
    large   linears without bias → names of their weights, of which some rows at a time are in memory
    """

    def __init__(self, folder: Path, blocks: Mapping[str, Iterable[str]], large: Mapping[str, str] = {}) -> None:
        self._folder, self._large = folder, large
        self._model = onnx.load(folder / FILE, load_external_data=False)
        self._whole = WholeModel(self._model)
        owner = {node: block for block, nodes in blocks.items() for node in nodes}
        self._nodes: dict[str, list[NodeProto]] = {block: [] for block in blocks}
        for node in self._model.graph.node:
            block = owner.get(_unit(node))
            if block is not None:  # no block has the copies of results under the names of outputs
                self._nodes[block].append(node)
        self._reads = {block: outside_reads(nodes) for block, nodes in self._nodes.items()}
        self._values: dict[str, np.ndarray] = {}

    def run(self, block: str, inputs: Mapping[str, Any], results: Iterable[str] = ()) -> dict[str, Tensor]:
        """Run the next block.

        inputs   placeholder of the fx graph → its value, for those that the block reads
        results  fx nodes of the block whose values to return, beside those that later blocks read
        """
        del self._reads[block]
        later = {name for names in self._reads.values() for name in names} | set(results)
        for nodes, needed in self._steps(block, later):
            self._run(block, nodes, needed, inputs)
        made = {name: torch.from_numpy(self._values[name]) for name in results}
        self._values = {name: value for name, value in self._values.items() if name in later}
        return made

    def _steps(self, block: str, later: set[str]) -> Iterator[tuple[list[NodeProto], set[str]]]:
        """Nodes that run together, a large linear alone, and what is read of their results."""
        alone = lambda node: _unit(node) if _unit(node) in self._large else ""  # noqa: E731
        steps = [list(nodes) for _, nodes in groupby(self._nodes[block], alone)]
        for index, nodes in enumerate(steps):
            yield nodes, later.union(*(outside_reads(others) for others in steps[index + 1 :]))

    def _run(self, block: str, nodes: list[NodeProto], needed: set[str], inputs: Mapping[str, Any]) -> None:
        reads = [name for name in outside_reads(nodes) if name not in self._whole.initializers]
        outputs = sorted({output for node in nodes for output in node.output} & needed)
        values = [self._feed(name, inputs) for name in reads]
        name = _unit(nodes[0])
        if name in self._large:
            given = map(torch.from_numpy, values)
            self._values[name] = run_by_rows(self._folder, name, self._large[name], list(given)).numpy()
        elif outputs:
            session = load_session(self._part(block, nodes, reads, outputs), self._folder)
            results = session.run(outputs, dict(zip(reads, values, strict=True)))
            self._values |= dict(zip(outputs, results, strict=True))
        return_freed_memory()

    def _feed(self, name: str, inputs: Mapping[str, Any]) -> np.ndarray:
        given = inputs[self._whole.placeholders[name]] if name in self._whole.placeholders else self._values[name]
        return given.contiguous().numpy() if isinstance(given, Tensor) else given

    def _part(self, block: str, nodes: list[NodeProto], reads: list[str], outputs: list[str]) -> ModelProto:
        part, whole = ModelProto(), self._model
        part.ir_version = whole.ir_version
        part.opset_import.extend(whole.opset_import)
        part.functions.extend(whole.functions)
        part.graph.name = block
        part.graph.node.extend(nodes)
        part.graph.input.extend(self._whole.typed(name, name) for name in reads)
        part.graph.output.extend(self._whole.typed(name, name) for name in outputs)
        used = set(outside_reads(nodes))
        part.graph.initializer.extend(tensor for tensor in whole.graph.initializer if tensor.name in used)
        return part


def _unit(node: NodeProto) -> str:
    return node.name.partition("/")[0]
