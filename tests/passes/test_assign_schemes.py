"""Recipes: which scheme a module gets, and which it cannot have."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import traced
from rewrites import assigned, misfit
from tiny import float_program
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.models import DecoderLayer
from fxquant.models.deepseek_v3 import MLP
from fxquant.policy.kinds import Kind
from fxquant.program.linears import linear_sites
from fxquant.schemes.schemes import Recipe, Scheme, WeightAlgorithm

# assign-schemes


def test_recipes_say_how_each_tensor_is_made(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "deepseek_w4a8")
    layer, experts = "model.layers.1", [f"model.layers.1.mlp.experts.{expert}" for expert in range(8)]
    assert program.recipes[f"{layer}.self_attn.q_b_proj"] == Recipe(
        f"{layer}.self_attn.q_b_proj", (f"{layer}.self_attn.q_b_proj",), Scheme.W8A8, 0, 96, 64, False, False,
        torch.bfloat16,
    )  # fmt: skip
    assert program.recipes[f"{layer}.mlp.experts.down_proj"] == Recipe(
        f"{layer}.mlp.experts.down_proj", tuple(f"{expert}.down_proj" for expert in experts), Scheme.W4A8_DYNAMIC, 256,
        256, 256, False, True, torch.bfloat16, algorithm=WeightAlgorithm.CLIP,
    )  # fmt: skip


def test_recipes_know_biases(tiny: Callable[..., Checkpoint]) -> None:
    program = assigned(float_program(tiny(attention_bias=True)), "deepseek_w4a8")
    biased = {module.rpartition(".")[2] for module, recipe in program.recipes.items() if recipe.bias}
    assert biased == {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"}


ROW_PARALLEL = {"o_proj", "down_proj"}


def test_row_parallel_linears_read_what_their_block_made(checkpoint: Checkpoint) -> None:
    sites = {site.module: site.row_parallel for site in linear_sites(float_program(checkpoint))}
    assert sites == {module: module.rpartition(".")[2] in ROW_PARALLEL for module in sites}
    assert {module.rpartition(".")[2] for module in sites} >= {
        "q_b_proj",
        "kv_b_proj",
        "gate_proj",
        "lm_head",
        "o_proj",
    }


class SwappedMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.gate_proj(ops.swiglu(self.down_proj(x), self.up_proj(x)))


class SwappedNames(DecoderLayer):
    """Its MLP calls down_proj first and gate_proj last."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 0:
            self.mlp = SwappedMLP(config, config.intermediate_size, Kind.DENSE_MLP)


def test_row_parallel_is_in_the_graph_and_not_in_the_names(checkpoint: Checkpoint) -> None:
    program = traced(checkpoint, SwappedNames)
    sites = {site.module: site.row_parallel for site in linear_sites(program)}
    projections = [sites[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down")]
    assert projections == [True, False, False]
    assert sites["model.layers.1.mlp.shared_experts.down_proj"]


@pytest.mark.parametrize(
    ("changes", "policy", "layer", "facts", "way_out"),
    [
        (
            {"moe_intermediate_size": 128}, "deepseek_w4a8_msmodelslim", "experts.down_proj",
            "in_features 128 is not a multiple of group_size 256", "group_size: 128",
        ),
        (
            {"moe_intermediate_size": 320}, "deepseek_w4a8_msmodelslim", "experts.down_proj",
            "in_features 320 is not a multiple of group_size 256", "group_size: 64",
        ),
        (
            {"moe_intermediate_size": 255}, "deepseek_w4a8", "experts.gate_proj",
            "out_features 255 is odd", "W8A8_DYNAMIC",
        ),
        (
            {"moe_intermediate_size": 72}, "deepseek_w4a8_per_channel", "experts.down_proj",
            "in_features 72 is not a multiple of 16", "W8A8_DYNAMIC",
        ),
    ],
    ids=["group", "smaller group", "odd", "chunks"],
)  # fmt: skip
def test_a_scheme_that_does_not_fit_is_refused_with_a_way_out(
    changes: dict[str, int], policy: str, layer: str, facts: str, way_out: str
) -> None:
    program = misfit(**changes)
    with pytest.raises(FxquantError) as caught:
        assigned(program, policy)
    assert caught.value.place == f"layer model.layers.1.mlp.{layer}"
    assert facts in caught.value.fact and "W4A8_DYNAMIC" in caught.value.fact
    assert way_out in caught.value.remedy


def test_odd_out_features_fit_int8(tmp_path: Path) -> None:
    program = assigned(misfit(moe_intermediate_size=255), "deepseek_w8a8")
    assert program.recipes["model.layers.1.mlp.experts.gate_proj"].out_features == 255


def test_static_routed_experts_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    policy = "extends: deepseek_w4a8\nrules: [{kind: routed_expert, scheme: W8A8}]"
    with pytest.raises(FxquantError, match="routed experts have no static scheme") as caught:
        assigned(float_program(checkpoint), policy, tmp_path)
    assert caught.value.place == "model.layers.1.mlp.experts.gate_proj"
    assert "W4A8_DYNAMIC" in caught.value.remedy
