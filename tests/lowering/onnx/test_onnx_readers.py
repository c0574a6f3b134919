"""Readers of model.onnx other than the session that we make: each loads it, and runs a prompt and a step after it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnx_calls import Lowered, floats, int8, integers, restored
from onnx_graphs import emit, quantized
from onnx_reader_process import WAYS, run_steps
from onnx_readers import DOWNLOADED, FEEDS, HERE, ONNXRUNTIME, Package, Reader, read, write_feeds

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.onnx.required import stored_form
from fxquant.lowering.onnx.runner import products_saturate

STOPS = {
    "version_converter": "fxquant:rope_table(-1) is not a registered function",
    "onnxslim": "maximum recursion depth exceeded",
    "openvino": "Conversion is failed for: Slice",
}
"""Ways that cannot read local functions, and what is said there; docs/onnx.md names them."""
CONTRIB_STOPS = {
    "reference_evaluator": "'QMoE' from domain 'com.microsoft' is unknown",
    "version_converter": STOPS["version_converter"],
    "onnxruntime": "Too many inputs for op QMoE",
    "onnxslim": "bound to different types",
    "openvino": "fxquant.static_linear",
    "inlined_openvino": "com.microsoft.QMoE",
    "onnxruntime-node": "Unrecognized attribute: accuracy_level for operator QMoE",
    "onnxruntime-web": "Unrecognized attribute: accuracy_level for operator QMoE",
}
"""Ways that cannot read the profile `ort`, for which ONNX Runtime must be 1.31 or newer: these releases are older."""

SHARES_ZERO_POINTS = "inlined_onnxslim"
"""onnxruntime adds 128 to a zero point once for each product that reads it, where products would saturate."""


@pytest.fixture(scope="module", params=OnnxProfile)
def folder(
    tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """Static int8, dynamic int4 experts and float attention; feeds.json beside the model."""
    place = tmp_path_factory.mktemp("readers")
    checkpoint = tiny()
    program = quantized(checkpoint, "deepseek_w4a8")
    emit(program, checkpoint, place, OnnxForm(request.param))
    widths = [int(node.meta["val"].shape[2]) for node in program.graph.graph.find_nodes(op="placeholder")[3:]]
    write_feeds(place, 128, widths)
    return place


def logits(way: str, folder: Path, scratch: Path) -> np.ndarray:
    for weights in folder.glob("*.safetensors"):
        (scratch / weights.name).write_bytes(weights.read_bytes())
    run = WAYS[way][1](folder / "model.onnx", scratch)
    return run_steps(run, json.loads((folder / FEEDS).read_text()))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    return logits(ONNXRUNTIME.way, folder, tmp_path_factory.mktemp("expected"))


def assert_reads(reader: Reader, found: np.ndarray, expected: np.ndarray, flips: float = 0.01) -> None:
    """Another runtime's last bits may flip an activation's code by one step, and later layers amplify it: 1%."""
    if reader.equal:
        assert np.array_equal(found, expected)
    else:
        assert found.shape == expected.shape
        assert np.linalg.norm(found - expected) <= flips * np.linalg.norm(expected)


@pytest.mark.parametrize("reader", [one for one in HERE if one.way not in STOPS], ids=lambda one: one.way)
def test_what_is_installed_with_us_reads_it(reader: Reader, folder: Path, expected: np.ndarray, tmp_path: Path):
    if reader.way in stops(folder):
        with pytest.raises(Exception, match=re.escape(stops(folder)[reader.way])):
            logits(reader.way, folder, tmp_path)
        return
    assert_reads(reader, logits(reader.way, folder, tmp_path), expected)


def stops(folder: Path) -> dict[str, str]:
    """Ways that cannot read its graph, and what is said there."""
    return CONTRIB_STOPS if stored_form(folder).profile.contrib else STOPS


def test_the_version_converter_drops_local_functions(folder: Path, tmp_path: Path):
    """Where a release keeps them, its line in docs/onnx.md goes."""
    with pytest.raises(Exception, match="is not a registered function") as caught:
        logits("version_converter", folder, tmp_path)
    assert STOPS["version_converter"] in str(caught.value)


@pytest.mark.engines
@pytest.mark.parametrize("reader", DOWNLOADED, ids=lambda one: f"{one.way}-{one.version}")
def test_released_readers(reader: Reader, folder: Path, expected: np.ndarray):
    reading = read(reader, folder, folder)
    if reader.way == SHARES_ZERO_POINTS and products_saturate():
        assert reading.logits is None and "graph.cc" in reading.words
    elif reader.way in stops(folder):
        assert reading.logits is None and stops(folder)[reader.way] in reading.words
    else:
        assert reading.logits is not None, reading.words
        assert reading.version == reader.version
        # what scales its static codes by itself may be off by a step of 1/127 in each of the six quantizations in a row
        static = reader.way == "inlined_openvino" and stored_form(folder).profile is OnnxProfile.QDQ
        assert_reads(reader, reading.logits, expected, 6 / 127 if static else 0.01)


def test_what_stops_is_said(folder: Path, tmp_path: Path):
    write_feeds(tmp_path, 128, [])
    reading = read(Reader("", "onnxruntime", "onnxruntime", Package.HERE), folder, tmp_path)
    assert reading.logits is None and "past_key_values.0.latent" in reading.words


QUANTIZE = (ops.quantize_static, (floats(5, 64, scale=3), torch.tensor([0.02]), torch.tensor([3.0])), ())
OPERATORS = {
    "quantize_static": QUANTIZE,
    "quantize_per_token": (ops.quantize_per_token, (floats(20, 7, 33, scale=100),), ()),
    "int_matmul": (ops.int_matmul, (int8(1, 7, 64), int8(6, 64, seed=1)), ("weight",)),
    "int4_matmul": (
        ops.int4_matmul,
        (int8(5, 128), int8(12, 128, seed=1), integers(1, 16, 24, 4, dtype=torch.int32).float()),
        ("weight", "weight_scale_second"),
    ),
    "moe_gate": (ops.moe_gate, (floats(3, 7, 16), floats(16, seed=1, scale=0.1), 3, 4, 2, True, 2.5), ()),
    "moe_init_routing": (ops.moe_init_routing, (floats(2, 9, 8), integers(0, 6, 2, 9, 3, dtype=torch.int64), 7), ()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_reference_evaluator_computes_the_same_integers(name: str, tmp_path: Path):
    target, arguments, stored = OPERATORS[name]
    lowered = Lowered(tmp_path, target, arguments, stored)
    onnx.save(lowered.model, tmp_path / "one.onnx")
    found = [restored(value) for value in ReferenceEvaluator(str(tmp_path / "one.onnx")).run(None, lowered.feeds)]
    results: Any = target(*arguments)
    whole = [
        value for value in (results if isinstance(results, tuple) else (results,)) if not value.is_floating_point()
    ]
    assert whole
    for value, expected in zip((one for one in found if not one.is_floating_point()), whole, strict=True):
        assert torch.equal(value, expected)
