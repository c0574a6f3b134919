"""Branches of routed experts, run by onnxruntime: each expert gets its own rows, whatever their number."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fxquant.lowering.onnx.builder import IR_VERSION, OPSET, Builder
from fxquant.lowering.onnx.expert_branches import FANOUT, Like, run_busy

WIDTH = 3
SIZES = (1, 2, FANOUT, FANOUT + 1, FANOUT**2, FANOUT**2 + 3, FANOUT**3 + 1)


def _session(number: int) -> onnxruntime.InferenceSession:
    """rows, counts → rows times the number of their expert plus one."""
    b = Builder()
    rows = ir.Value(name="rows", shape=ir.Shape([None, WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    counts = ir.Value(name="counts", shape=ir.Shape([number]), type=ir.TensorType(ir.DataType.INT64))

    def run(inner: Builder, expert: int, start: ir.Value, end: ir.Value) -> ir.Value:
        own = inner.op("Slice", rows, start, end, inner.ints(0))
        return inner.op("Mul", own, inner.number(expert + 1))

    result = run_busy(b, counts, number, Like(ir.DataType.FLOAT, (WIDTH,)), run)
    result.dtype = ir.DataType.FLOAT
    graph = ir.Graph([rows, counts], [result], nodes=b.nodes, opset_imports={"": OPSET}, name="branches")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def sessions() -> dict[int, onnxruntime.InferenceSession]:
    return {number: _session(number) for number in SIZES}


@settings(max_examples=60)
@given(data=st.data(), number=st.sampled_from(SIZES))
def test_each_row_goes_through_its_expert(sessions, data, number):
    counts = np.array(data.draw(st.lists(st.integers(0, 2), min_size=number, max_size=number)), np.int64)
    counts[data.draw(st.integers(0, number - 1))] += 1
    rows = np.arange(counts.sum() * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
    (result,) = sessions[number].run(None, {"rows": rows, "counts": counts})
    assert (result == rows * (np.repeat(np.arange(number), counts) + 1)[:, None]).all()
