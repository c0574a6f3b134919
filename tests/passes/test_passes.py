"""Subclasses, coverage, and the contract of a pass."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from graphs import traced
from rewrites import CALIBRATION, Rewritten, assigned, integers_of, rewrite
from tiny import float_program
from torch import Tensor, fx

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError, InternalError
from fxquant.models import DecoderLayer
from fxquant.passes import (
    CheckCoverage,
    Pass,
    PassResult,
    QuantizeExperts,
    QuantizeLinear,
    RewritePass,
    run_passes,
)
from fxquant.program.linears import linear_sites
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.schemes.schemes import Recipe, Scheme

# subclasses

MIXING = "model.layers.0.mlp.mixing"


class Twice(DecoderLayer):
    """Layer 0 sends its MLP's input through up_proj, and what comes out, rescaled, through it again."""

    factor = 100.0

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 0:
            self.mlp.forward = lambda x: self.mlp.down_proj(self.mlp.up_proj(self.mlp.up_proj(x) * self.factor))


class TwiceSmaller(Twice):
    factor = 0.01


class FunctionalMLP(DecoderLayer):
    """Calls the operator on its projection's weight, from the module of the whole MLP."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 0:
            mlp = self.mlp
            mlp.forward = lambda x: ops.linear(
                ops.swiglu(ops.linear(x, mlp.gate_proj.weight), ops.linear(x, mlp.up_proj.weight)), mlp.down_proj.weight
            )


class ComputedWeight(DecoderLayer):
    """Layer 0 multiplies by a weight that is not the stored one."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 0:
            mlp = self.mlp
            mlp.forward = lambda x: mlp.down_proj(ops.swiglu(mlp.gate_proj(x), ops.linear(x, mlp.up_proj.weight * 2)))


def test_a_linear_called_from_elsewhere_is_rewritten(checkpoint: Checkpoint) -> None:
    done = rewrite(checkpoint, "deepseek_w4a8", traced(checkpoint, FunctionalMLP))
    assert len(done.program.nodes(ops.linear)) == 3
    recipe = done.program.recipes["model.layers.0.mlp.gate_proj"]
    codes, _ = integers_of(recipe, recipe.module, checkpoint)
    (matmul,) = (n for n in done.program.nodes(ops.int_matmul) if n.args[1].target == f"{recipe.module}.weight")
    product = done.values[matmul.args[0].name].double() @ codes.double().T
    assert torch.equal(done.values[matmul.name].double(), product)


def test_a_computed_weight_is_kept_with_the_reason(checkpoint: Checkpoint, tmp_path: Path) -> None:
    policy = "extends: deepseek_w4a8_dynamic\nrules: [{path: '*.0.mlp.up_proj', scheme: FLOAT}]"
    program = assigned(traced(checkpoint, ComputedWeight), policy, tmp_path)
    skipped = QuantizeLinear()(program).skipped
    assert "its weight is computed" in skipped.values()
    assert "model.layers.0.mlp.up_proj" not in program.recipes


class OtherName(DecoderLayer):
    """Layer 0 multiplies by a parameter that is not called weight."""

    def __init__(self, config: DeepseekV3Config, index: int) -> None:
        super().__init__(config, index)
        if index == 0:
            mlp, size = self.mlp, config.hidden_size
            mlp.mixing = torch.nn.Parameter(torch.empty(size, size))
            mlp.forward = lambda x: mlp.down_proj(ops.swiglu(mlp.gate_proj(x), mlp.up_proj(ops.linear(x, mlp.mixing))))


def test_a_linear_whose_weight_has_another_name_is_refused_or_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(FxquantError, match=r"^model\.layers\.0\.mlp: model\.layers\.0\.mlp\.mixing is to be quantized"):
        assigned(traced(checkpoint, OtherName), "deepseek_w4a8_dynamic")
    policy = "extends: deepseek_w4a8_dynamic\nrules: [{path: '*.0.mlp', scheme: FLOAT}]"
    program = assigned(traced(checkpoint, OtherName), policy, tmp_path)
    run_passes(program, [QuantizeLinear(), QuantizeExperts(), CheckCoverage()])
    (floating,) = (node for node in program.nodes(ops.linear) if operand_node(node, "weight").target == MIXING)
    assert program.parameter(operand_node(floating, "weight")).role == "mixing"
    assert "model.layers.0.mlp.gate_proj" in program.recipes


@pytest.mark.parametrize("layer", [Twice, TwiceSmaller])
def test_a_linear_used_twice_is_calibrated_for_both_inputs(
    layer: type[Twice], checkpoint: Checkpoint, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "extends: deepseek_w4a8\nactivation_statistic: min_max\nrules: [{path: '*.0.mlp.up_proj', scheme: W8A8}]"
    )
    program = traced(checkpoint, layer)
    sites = [site.node for site in linear_sites(program) if site.module == "model.layers.0.mlp.up_proj"]
    assert len(sites) == 2
    extremes: list[Tensor] = []
    inputs = {site.args[0] for site in sites}
    execute(
        program, checkpoint.read, [prefill_inputs(program, CALIBRATION[0])],
        lambda node, values, live: extremes.extend([values[0].min(), values[0].max()] if node in inputs else []),
    )  # fmt: skip
    observed = rewrite(checkpoint, str(policy), program).program.recipes["model.layers.0.mlp.up_proj"].activation
    assert (observed.low, observed.high) == (min(extremes).item(), max(extremes).item())


# check-coverage


def test_coverage_holds_after_the_pipeline(under: Callable[[str], Rewritten]) -> None:
    assert CheckCoverage()(under("deepseek_w4a8").program) == PassResult("check-coverage")


@pytest.mark.parametrize("layer", [DecoderLayer, FunctionalMLP])
def test_a_linear_left_in_float_is_a_fault(layer: type[DecoderLayer], checkpoint: Checkpoint, tmp_path: Path) -> None:
    policy = "rules: [{path: '*.0.mlp.*', scheme: W8A8_DYNAMIC}, {path: '*', scheme: FLOAT}]"
    program = assigned(traced(checkpoint, layer), policy, tmp_path)
    with pytest.raises(FxquantError, match=r"model\.layers\.0\.mlp\.gate_proj: has a recipe, but is still float"):
        CheckCoverage()(program)


def test_experts_left_in_float_are_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "deepseek_w4a8_dynamic")
    QuantizeLinear()(program)
    with pytest.raises(FxquantError, match=r"mlp\.experts\S*: has a recipe, but is still float"):
        CheckCoverage()(program)


def test_experts_quantized_in_part_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One fused node reads all three projections: it is rewritten whole or not at all."""
    policy = "extends: deepseek_w4a8_dynamic\nrules: [{path: '*.experts.down_proj', scheme: FLOAT}]"
    program = assigned(float_program(checkpoint), policy, tmp_path)
    QuantizeLinear()(program)
    skipped = QuantizeExperts()(program).skipped
    assert skipped == {"layers_1_mlp_experts": "policy keeps down_proj in float"}
    with pytest.raises(FxquantError, match=r"model\.layers\.1\.mlp\.experts"):
        CheckCoverage()(program)


def test_a_parameter_without_a_rule_is_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "float")
    del program.rules["model.norm"]
    with pytest.raises(FxquantError, match=r"model\.norm\.weight: is neither rewritten nor kept"):
        CheckCoverage()(program)


def test_a_recipe_that_nobody_reads_is_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "float")
    stray = Recipe("stray", ("stray",), Scheme.W8A8_DYNAMIC, 0, 2, 2, False, False, torch.bfloat16)
    program.recipes["stray"] = stray
    with pytest.raises(InternalError, match="stray: has a recipe, but no node reads its integers"):
        CheckCoverage()(program)


def test_a_node_without_a_checked_shape_is_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "float")
    del program.nodes(ops.swiglu)[0].meta["val"]
    with pytest.raises(InternalError, match="layers_0_mlp_swiglu: has no checked shape"):
        CheckCoverage()(program)


# the contract of a pass


class DoubleEverySwiglu(RewritePass):
    """A pass of one: swiglu(gate, up) → swiglu(gate, up) + itself, in layer 0 only."""

    name = "double"

    def why_not(self, node: fx.Node, program: Program) -> str | None:
        if node.target != ops.swiglu:
            return ""
        return None if node.meta["block"] == "model.layers.0" else "not in layer 0"

    def rewrite(self, node: fx.Node, program: Program) -> None:
        graph = program.graph.graph
        with graph.inserting_after(node):
            doubled = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
        doubled.meta = dict(node.meta)
        node.replace_all_uses_with(doubled, lambda user: user is not doubled)


def test_a_pass_reports_names_and_reasons(checkpoint: Checkpoint) -> None:
    program = float_program(checkpoint)
    skipped = {"layers_1_mlp_shared_experts_swiglu": "not in layer 0"}
    assert DoubleEverySwiglu()(program) == PassResult("double", ("layers_0_mlp_swiglu",), skipped)


def test_a_pass_that_is_listed_twice_rewrites_twice(checkpoint: Checkpoint) -> None:
    alone, listed = float_program(checkpoint), float_program(checkpoint)
    before = len(alone.nodes(torch.ops.aten.add.Tensor))
    DoubleEverySwiglu()(alone)
    run_passes(listed, [DoubleEverySwiglu(), DoubleEverySwiglu()])
    assert [len(program.nodes(torch.ops.aten.add.Tensor)) - before for program in (alone, listed)] == [1, 2]


@pytest.mark.parametrize("kind", (Pass, RewritePass))
def test_a_pass_without_rules_cannot_be_made(kind: type[Pass]) -> None:
    class Unfinished(kind):  # type: ignore[valid-type, misc]
        name = "unfinished"

    with pytest.raises(TypeError, match="abstract"):
        Unfinished()
