"""The pass of the ONNX graph that leaves the order of an attention's products to the target."""

from pathlib import Path

import torch
from ascend_folders import padded_inputs, rewritten
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import OnnxProfile
from fxquant.lowering.onnx.deployment import deployment
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import execute
from fxquant.runtime.weight_providers import Cached, RecipeWeights


def outputs(program: Program, checkpoint: Checkpoint) -> list[Tensor]:
    return execute(program, Cached(RecipeWeights(program, checkpoint)), [padded_inputs(program)])[0]


def test_every_attention_reads_latents_and_computes_the_same(checkpoint: Checkpoint):
    program = rewritten(checkpoint, "deepseek_w4a8")
    deployed = deployment(program, OnnxForm(OnnxProfile.INTEGER))
    layers = len(program.nodes(ops.mla_attention))
    joined = deployed.program.nodes(ops.attend_latents)
    assert layers == len(joined) == 2 and not deployed.program.nodes(ops.mla_attention)
    # the name stays: whoever compares graphs finds the value
    assert [node.name for node in joined] == [node.name for node in program.nodes(ops.mla_attention)]
    assert all(operand_node(node, "kv_b_weight").op == "get_attr" for node in joined)
    pairs = zip(outputs(program, checkpoint), outputs(deployed.program, checkpoint), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


QUANTIZED = """
extends: float
rules:
  - {path: "*.kv_b_proj", scheme: W8A8_DYNAMIC, why: speed}
"""


def test_quantized_keys_and_values_stay(checkpoint: Checkpoint, tmp_path: Path):
    (tmp_path / "kv.yaml").write_text(QUANTIZED)
    (step,) = deployment(rewritten(checkpoint, str(tmp_path / "kv.yaml")), OnnxForm(OnnxProfile.INTEGER)).steps
    reasons = set(step.result.skipped.values())
    assert not step.result.rewritten and len(step.result.skipped) == 2
    assert all("is not a float linear" in reason for reason in reasons), reasons
