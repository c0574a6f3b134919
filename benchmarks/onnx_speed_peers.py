"""onnxruntime's own quantizers on a float graph of ours, each called in a process of its own."""

import logging
from collections.abc import Iterator
from pathlib import Path

import onnx

from fxquant.lowering.onnx.runner import session_options
from fxquant.lowering.onnx.runtime import onnxruntime
from fxquant.lowering.onnx.writer import FILE

DATA = "model.data"
BLOCK = 128


def fold(folder: Path, out: Path) -> None:
    """Write the graph with functions inlined and weights as onnxruntime folds them, float32 [k, n]: what its quantizers
    look for."""
    out.mkdir()
    options = session_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(out / FILE)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", DATA)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    onnxruntime.InferenceSession(str(folder / FILE), options, providers=["CPUExecutionProvider"])


def quantize_dynamic(folder: Path, out: Path, kept: list[str] | None) -> None:
    """int8 weights, one scale a channel; one scale a tensor for activations, at run time.

    kept  names of values: the products that make them stay, and those of more than a matrix. None: all it can
    """
    from onnxruntime.quantization import quantize_dynamic as quantize

    logging.disable()
    out.mkdir()
    quantize(
        folder / FILE, out / FILE, op_types_to_quantize=["MatMul"], per_channel=True, use_external_data_format=True,
        extra_options={"EnableSubgraph": True}, nodes_to_exclude=_excluded(folder, kept),
    )  # fmt: skip


def quantize_nbits(level: int, folder: Path, out: Path, kept: list[str] | None) -> None:
    """int4 weights in blocks of 128; activations are float at accuracy level 0, int8 by the block at 4."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable()
    out.mkdir()
    quantizer = MatMulNBitsQuantizer(
        str(folder / FILE), block_size=BLOCK, is_symmetric=True, accuracy_level=level,
        nodes_to_exclude=_excluded(folder, kept),
    )  # fmt: skip
    quantizer.process()
    quantizer.model.save_model_to_file(str(out / FILE), True)


def _excluded(folder: Path, kept: list[str] | None) -> list[str]:
    if kept is None:
        return []
    graph = onnx.load(folder / FILE, load_external_data=False).graph
    names = {"logits", *kept}
    matrices = {tensor.name for part in _graphs(graph) for tensor in part.initializer if len(tensor.dims) == 2}
    products = [node for part in _graphs(graph) for node in part.node if node.op_type == "MatMul"]
    return [node.name for node in products if names.intersection(node.output) or node.input[1] not in matrices]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """It and its branches."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)
