"""The passes that hand int4 products to onnxruntime's own operators: what they rewrite, what they leave, and values."""

from collections import Counter
from dataclasses import replace

import pytest
from ascend_folders import rewritten

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.engines.onnx_profile import AccuracyLevel, OnnxProfile
from fxquant.errors import FxquantError
from fxquant.lowering.onnx.deployment import deployment
from fxquant.passes.check_blocks import CheckBlocks
from fxquant.program.node_names import operator_name
from fxquant.program.operands import arguments
from fxquant.program.program import Program
from fxquant.schemes.schemes import Scheme, block_size
from fxquant.schemes.weight_formats import WeightFormat


def in_blocks(checkpoint: Checkpoint, policy: str) -> Program:
    program = rewritten(checkpoint, policy)
    for module, recipe in program.recipes.items():
        program.recipes[module] = replace(recipe, weight_format=WeightFormat.BLOCKS)
    return program


def counted(program: Program) -> Counter[str]:
    return Counter(operator_name(node) for node in program.graph.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w4a8_shared_w4"])
def test_every_int4_product_is_a_block_operator(checkpoint: Checkpoint, policy: str):
    program = in_blocks(checkpoint, policy)
    CheckBlocks()(program)
    before = counted(program)
    deployed = deployment(program, OnnxForm(OnnxProfile.ORT, accuracy_level=AccuracyLevel.FLOAT)).program
    after = counted(deployed)
    assert after["block_experts"] == before["moe_finalize_routing"] > 0
    assert after["block_linear"] == before["int4_matmul"]
    assert not any("int4_matmul" in name or "int4_linear" in name or "routing" in name for name in after)
    names = {node.name for node in program.graph.graph.nodes}
    for node in [*deployed.nodes(ops.block_experts), *deployed.nodes(ops.block_linear)]:
        assert node.name in names and arguments(node)["accuracy_level"] == 0
        assert arguments(node)["block_size"] == 256 or node.target == ops.block_linear


def test_other_profiles_and_int8_experts_have_none(checkpoint: Checkpoint):
    assert not any(
        "block" in name for name in counted(deployment(rewritten(checkpoint, "deepseek_w4a8"), OnnxForm()).program)
    )
    eight = counted(deployment(in_blocks(checkpoint, "deepseek_w8a8"), OnnxForm(OnnxProfile.ORT)).program)
    assert eight["grouped_linear"] and not any("block" in name for name in eight)


def test_a_block_is_the_largest_that_divides_groups_or_rows(checkpoint: Checkpoint):
    recipe = next(recipe for recipe in in_blocks(checkpoint, "deepseek_w4a8").recipes.values() if recipe.int4)
    sizes = {(0, 7168): 256, (0, 96): 32, (512, 1024): 256, (48, 96): 16, (24, 96): None, (0, 40): None}
    for (group_size, in_features), size in sizes.items():
        assert block_size(replace(recipe, group_size=group_size, in_features=in_features)) == size


def test_what_the_operators_can_not_take_is_refused_by_name(checkpoint: Checkpoint):
    program = in_blocks(checkpoint, "deepseek_w4a8_per_channel")
    gate = next(module for module, recipe in program.recipes.items() if recipe.int4)
    right = program.recipes[gate]
    program.recipes[gate] = replace(right, in_features=24)
    with pytest.raises(FxquantError, match=rf"layer {gate}: in_features 24 is no multiple of 16.*--onnx-profile qdq"):
        CheckBlocks()(program)
    program.recipes[gate] = replace(right, scheme=Scheme.W8A8_DYNAMIC)
    with pytest.raises(FxquantError, match="QMoE has one number of bits"):
        CheckBlocks()(program)
