"""The pass that says a quantized linear in one operator: what it joins, what it leaves, and that numbers hold."""

from collections import Counter

import pytest
import torch
from ascend_folders import padded_inputs, rewritten
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.lowering.onnx.deployment import deployment
from fxquant.passes.onnx.join_linears import DEQUANTIZE, JoinLinears
from fxquant.program.node_builder import Surgery
from fxquant.program.node_names import operator_name
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import execute
from fxquant.runtime.weight_providers import Cached, RecipeWeights


def outputs(program: Program, checkpoint: Checkpoint) -> list[Tensor]:
    return execute(program, Cached(RecipeWeights(program, checkpoint)), [padded_inputs(program)])[0]


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w8a8", "deepseek_w4a8_dynamic", "float"])
def test_every_linear_is_one_operator_and_computes_the_same(checkpoint: Checkpoint, policy: str):
    program = rewritten(checkpoint, policy)
    joined = deployment(program, OnnxForm()).program
    counts = Counter(operator_name(node) for node in joined.graph.graph.nodes if node.op == "call_function")
    assert not [node for node in joined.graph.graph.nodes if node.target in DEQUANTIZE]
    linears = [node for node in program.graph.graph.nodes if node.target in DEQUANTIZE]
    assert sum(counts[name] for name in counts if name.endswith("_linear")) == len(linears)
    assert {node.name for node in linears} <= {node.name for node in joined.graph.graph.nodes}
    assert all(
        torch.equal(*pair) for pair in zip(outputs(program, checkpoint), outputs(joined, checkpoint), strict=True)
    )


def test_sums_that_something_else_reads_stay(checkpoint: Checkpoint):
    program = rewritten(checkpoint, "deepseek_w4a8_dynamic")
    node = program.nodes(ops.dequantize_per_token)[0]
    product = operand_node(node, "acc")
    surgery = Surgery(program, node)
    other = surgery.call(torch.ops.aten.add.Tensor, (product, product), "twice")
    program.graph.graph.output_node().args = ([*program.graph.results, other],)
    assert JoinLinears().apply(program).skipped == {node.name: f"{product.name} is also read elsewhere"}
