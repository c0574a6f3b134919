"""Tiny programs after the pipeline, with the value of every node."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import float_program, meta_model, random_ids, tiny_config
from torch import Tensor, fx

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.passes import (
    AssignSchemes,
    Calibrate,
    PassResult,
    pipeline,
    run_passes,
)
from fxquant.policy.policy import load_policy, shipped_policies
from fxquant.program.node_builder import Surgery
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import RecipeWeights
from fxquant.schemes.schemes import Recipe, Scheme
from fxquant.verification.reference import expected_tensors

ULP = 2.0**-24
"""Half a unit in the last place of float32: the relative error of one operation."""
CALIBRATION = [torch.arange(16).view(1, 16) * 7 % 128]


@dataclass
class Rewritten:
    """A program after the pipeline, what each pass said, and the value of every node for one batch."""

    checkpoint: Checkpoint
    program: Program
    results: dict[str, PassResult]
    values: dict[str, Any]

    def node(self, name: str) -> fx.Node:
        return next(node for node in self.program.graph.graph.nodes if node.name == name)


def rewrite(checkpoint: Checkpoint, policy: str, program: Program | None = None) -> Rewritten:
    loaded, program = load_policy(policy), program or float_program(checkpoint)
    passes = pipeline(AssignSchemes(loaded), Calibrate(loaded, checkpoint, lambda: CALIBRATION))
    results = {result.name: result for result in run_passes(program, passes)}
    values: dict[str, Any] = {}
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 9))
    weights = RecipeWeights(program, checkpoint)
    execute(program, weights, [batch], lambda node, outputs, inputs: values.update({node.name: outputs[0]}))
    return Rewritten(checkpoint, program, results, values)


def assigned(program: Program, policy: str, tmp_path: Path | None = None) -> Program:
    """With recipes; `policy` is a name, or the text of a policy file if `tmp_path` says where to put it."""
    if tmp_path is not None:
        (tmp_path / "policy.yaml").write_text(policy)
        policy = str(tmp_path / "policy.yaml")
    AssignSchemes(load_policy(policy))(program)
    return program


def misfit(**changes: Any) -> Program:
    """The float graph of a model of such a shape; no weights are written."""
    checkpoint = Checkpoint(Path("tiny"), tiny_config(**changes), {})
    return float_program(checkpoint)


every_policy = pytest.mark.parametrize("policy", shipped_policies())


def check_registered(program: Program) -> None:
    """On the module are the tensors that the graph reads, on meta, and what a recipe makes is there as it is stored."""
    read = {node.target for node in program.graph.graph.nodes if node.op == "get_attr"}
    buffers = program.graph.tensors
    assert set(buffers) == set(program.parameters) == read
    assert all(buffer.device.type == "meta" for buffer in buffers.values())
    for module, recipe in program.recipes.items():
        assert buffers[f"{module}.weight"].dtype is torch.int8, module
        packed = recipe.scheme is Scheme.W4A8_DYNAMIC
        rows = recipe.out_features // 2 if packed else recipe.out_features
        assert tuple(buffers[f"{module}.weight"].shape[-2:]) == (rows, recipe.in_features)
        parameter = program.parameters[f"{module}.weight"]
        assert parameter.names == tuple(f"{name}.weight" for name in recipe.modules)


def integers_of(recipe: Recipe, module: str, checkpoint: Checkpoint) -> tuple[Tensor, Tensor]:
    """int64 [n, k] that the int matmul must multiply by, and float64 scale [n], by the reference."""
    expected = expected_tensors(recipe, checkpoint.read(f"{module}.weight"), None)
    codes = expected["weight"].long()
    if recipe.scheme is Scheme.W4A8_DYNAMIC:
        low, high = (codes & 15 ^ 8) - 8, codes >> 4
        codes = torch.stack((low, high), 1).flatten(0, 1)
    second = expected.get("weight_scale_second", torch.ones(len(codes), 1)).long()
    codes = codes * second.repeat_interleave(codes.shape[1] // second.shape[1], 1)
    return codes, expected["weight_scale"].flatten().double()


def insert_after(program: Program, name: str, target: Any, *args: Any) -> fx.Node:
    """Put `target(node, *args)` between the node of that name and its users."""
    node = next(candidate for candidate in program.graph.graph.nodes if candidate.name == name)
    users = list(node.users)
    added = Surgery(program, users[0]).call(target, (node, *args), f"{name}_{target._opname}")
    for user in users:
        user.replace_input_with(node, added)
    return added
