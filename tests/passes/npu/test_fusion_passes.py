"""Fusion passes: what they rewrite, what they keep and why, and that the numbers hold."""

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from ascend_folders import padded_inputs, rewritten
from slowness import POLICIES as FEW_POLICIES
from slowness import others_slow
from torch import Tensor

from fxquant import ops
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.deployment import Deployment
from fxquant.models import DecoderLayer
from fxquant.passes import FuseSwigluQuantize, ShareQuantize
from fxquant.passes.npu.fuse_norm_quantize import WITHOUT_SUM
from fxquant.policy.policy import shipped_policies
from fxquant.program.node_builder import Surgery
from fxquant.program.node_names import operator_name
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, parse_program
from fxquant.runtime.execute import execute
from fxquant.runtime.weight_providers import Cached, RecipeWeights
from fxquant.schemes.schemes import ActivationRange
from fxquant.tools.fusion_table import fusion_table


@pytest.fixture(scope="module")
def plain(checkpoint: Checkpoint) -> Callable[[str], Program]:
    """`plain("float")`: a copy of the tiny model's program under a policy, before fusing."""
    texts: dict[str, str] = {}

    def get(policy: str) -> Program:
        if policy not in texts:
            texts[policy] = dump_program(rewritten(checkpoint, policy))
        return parse_program(texts[policy], policy)

    return get


def outputs(program: Program, checkpoint: Checkpoint) -> list[Tensor]:
    return execute(program, Cached(RecipeWeights(program, checkpoint)), [padded_inputs(program)])[0]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


FUSED = ("add_rms_norm", "add_rms_norm_quantize_static", "add_rms_norm_quantize_per_token", "swiglu_quantize_per_token")
LEFT = ("rms_norm", "quantize_static", "quantize_per_token", "swiglu", "add")
DYNAMIC, STATIC = ((2, 0, 2, 3), (5, 0, 7, 0, 1)), ((2, 1, 1, 3), (5, 5, 2, 0, 1))
COUNTS = {
    "deepseek_w4a8": ((2, 1, 1, 2), (5, 7, 1, 1, 1)),
    "deepseek_w4a8_dynamic": DYNAMIC,
    "deepseek_w4a8_msmodelslim": STATIC,
    "deepseek_w4a8_msmodelslim_m4": STATIC,
    "deepseek_w4a8_per_channel": DYNAMIC,
    "deepseek_w4a8_per_channel_static": STATIC,
    "deepseek_w4a8_shared_w4": STATIC,
    "deepseek_w8a8": STATIC,
    "float": ((4, 0, 0, 0), (5, 0, 0, 2, 1)),
}


@pytest.mark.parametrize("policy", others_slow(shipped_policies(), FEW_POLICIES))
def test_the_deployed_graph(policy: str, plain: Callable[[str], Program], checkpoint: Checkpoint) -> None:
    """Its operators, that it is whole, and that it computes the same bits; the stored graph stays as it was."""
    program = plain(policy)
    text = dump_program(program)
    deployed = deployment(program).program
    assert dump_program(program) == text
    nodes = [node for node in deployed.graph.graph.nodes if node.op == "call_function"]
    counts = Counter(map(operator_name, nodes))
    if policy in COUNTS:
        assert tuple(tuple(counts[name] for name in names) for names in (FUSED, LEFT)) == COUNTS[policy]
    names = [node.name for node in deployed.graph.graph.nodes]
    assert len(names) == len(set(names))
    assert all({"val", "module", "block", "kind"} <= node.meta.keys() for node in nodes)
    assert {node.target for node in deployed.graph.graph.find_nodes(op="get_attr")} == deployed.parameters.keys()
    assert deployed.recipes == program.recipes
    again = parse_program(dump_program(deployed), "again")
    assert dump_program(again) == dump_program(deployed)
    assert equal(outputs(program, checkpoint), outputs(deployed, checkpoint))


def step(deployed: Deployment, name: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """What a pass rewrote and kept."""
    (result,) = (fusion.result for fusion in deployed.steps if fusion.result.name == name)
    return result.rewritten, result.skipped


def test_passes_say_what_they_fused_and_why_they_kept_the_rest(plain: Callable[[str], Program]) -> None:
    deployed = deployment(plain("deepseek_w4a8"))
    latent = [f"layers_{i}_self_attn_{name}_layernorm" for i in (0, 1) for name in ("q_a", "kv_a")]
    shared = [f"layers_{i}_self_attn_kv_a_proj_with_mqa_input_int8" for i in (0, 1)]
    assert step(deployed, "share-quantize") == ((*shared, "layers_1_mlp_shared_experts_up_proj_input_int8"), {})
    norms = ("layers_0_post_attention_layernorm", "layers_1_input_layernorm", "layers_1_post_attention_layernorm")
    first = "layers_0_input_layernorm"
    assert step(deployed, "fuse-norm-quantize") == ((*norms, "norm"), dict.fromkeys([first, *latent], WITHOUT_SUM))
    swiglus = ("layers_0_mlp_swiglu", "layers_1_mlp_experts_swiglu")
    reasons = {"layers_1_mlp_shared_experts_swiglu": "read by quantize_static"}
    assert step(deployed, "fuse-swiglu-quantize") == (swiglus, reasons)
    counts = [(fusion.calls_before, fusion.calls_after) for fusion in deployed.steps]
    # each sharing saves a call; each norm its addition, two of the four a quantization too; each swiglu one
    assert [before - after for before, after in counts] == [3, 6, 2]
    assert [after for _, after in counts[:-1]] == [before for before, _ in counts[1:]]


def test_the_sum_is_read_where_it_is_made(plain: Callable[[str], Program]) -> None:
    """The residual of layer 0 is added in layer 1, which reads it again behind its attention."""
    deployed = deployment(plain("deepseek_w4a8")).program
    (total,) = (node for node in deployed.graph.graph.nodes if node.name == "layers_1_input_layernorm_sum")
    assert total.meta["block"] == "model.layers.1"
    assert [str(user.target) for user in total.users] == ["fxq.add_rms_norm.default"]
    (fused,) = (node for node in deployed.nodes(ops.add_rms_norm_quantize_static))
    summands = [argument.name for argument in fused.all_input_nodes[:2]]
    assert summands == ["layers_0_post_attention_layernorm_sum", "layers_0_mlp_down_proj"]


def test_different_ranges_are_not_shared(plain: Callable[[str], Program]) -> None:
    program = plain("deepseek_w4a8")
    module = "model.layers.0.self_attn.kv_a_proj_with_mqa"
    program.recipes[module] = replace(program.recipes[module], activation=ActivationRange(-1.0, 2.5))
    name, first = "layers_0_self_attn_kv_a_proj_with_mqa_input_int8", "layers_0_self_attn_q_a_proj_input_int8"
    reason = ShareQuantize()(program).skipped[name]
    assert reason.startswith(f"{first} reads the same input, but their ranges differ: ")
    assert reason.endswith(" and -1 … 2.5")
    # the norm has two readers now
    assert "layers_0_input_layernorm" not in step(deployment(program), "fuse-norm-quantize")[0]


def test_a_second_quantization_per_token_is_merged(plain: Callable[[str], Program], checkpoint: Checkpoint) -> None:
    program = plain("deepseek_w4a8_dynamic")
    expected = outputs(program, checkpoint)
    before = [node.name for node in program.graph.graph.nodes]
    matmul = next(n for n in program.nodes(ops.int_matmul) if n.name.endswith("kv_a_proj_with_mqa_int32"))
    surgery = Surgery(program, matmul)
    twin = surgery.call(ops.quantize_per_token, (matmul.args[0].args[0].args[0],), "twin")
    x8, scale = surgery.outputs(twin, ("twin_int8", "twin_scale"))
    (dequantize,) = matmul.users
    matmul.args, dequantize.args = (x8, *matmul.args[1:]), (matmul, scale, *dequantize.args[2:])
    assert ShareQuantize()(program).rewritten == ("twin",)
    assert [node.name for node in program.graph.graph.nodes] == before
    assert equal(outputs(program, checkpoint), expected)


class ReadsItsSumFirst(DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x + attended
        return x * 0.5 + self.mlp(self.post_attention_layernorm(x)), present


class WideResidual(DecoderLayer):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x), cos, sin, mask, past)
        x = x.to(torch.float32) + attended
        return (x + self.mlp(self.post_attention_layernorm(x))), present


class ScalarSum(DecoderLayer):
    """Sums of unequal shapes, and one with a factor."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        attended, present = self.self_attn(self.input_layernorm(x + 1), cos, sin, mask, past)
        x = torch.add(x, attended, alpha=2)
        return self.mlp(self.post_attention_layernorm(x)) + x[..., :1], present


@pytest.mark.parametrize(
    ("layer", "reasons"),
    [
        (ReadsItsSumFirst, {"layers_1_post_attention_layernorm": "layers_1_mul reads its sum before it"}),
        (WideResidual, dict.fromkeys(["layers_1_post_attention_layernorm", "norm"], "its sum stays in float32")),
        (ScalarSum, {f"layers_1_{name}_layernorm": WITHOUT_SUM for name in ("input", "post_attention")}),
    ],
)
def test_a_norm_is_kept_with_the_reason(
    layer: type[DecoderLayer], reasons: dict[str, str], checkpoint: Checkpoint
) -> None:
    program = rewritten(checkpoint, "deepseek_w4a8_dynamic", layer)
    deployed = deployment(program)
    skipped = step(deployed, "fuse-norm-quantize")[1]
    assert {name: skipped.get(name) for name in reasons} == reasons
    assert equal(outputs(program, checkpoint), outputs(deployed.program, checkpoint))


def test_a_wide_swiglu_is_kept(plain: Callable[[str], Program]) -> None:
    result = FuseSwigluQuantize(128)(plain("deepseek_w4a8_dynamic"))
    assert result.rewritten == ()
    assert set(result.skipped.values()) == {"256 features, the engine's operator takes at most 128"}


def test_a_swiglu_that_is_read_twice_is_kept(plain: Callable[[str], Program]) -> None:
    program = plain("deepseek_w4a8_dynamic")
    swiglu = program.nodes(ops.swiglu)[0]
    (quantize,) = swiglu.users
    read = Surgery(program, quantize).call(torch.ops.aten.add.Tensor, (swiglu, swiglu), "twice")
    quantize.args = (read,)
    assert FuseSwigluQuantize()(program).skipped == {swiglu.name: "read by add"}


def test_items_that_nobody_reads_are_no_obstacle(plain: Callable[[str], Program], checkpoint: Checkpoint) -> None:
    """A getitem twice over, as a user's own graph may have it."""
    program = plain("deepseek_w4a8_dynamic")
    expected = outputs(program, checkpoint)
    item = next(n for n in program.graph.graph.nodes if n.name == "layers_1_input_layernorm_int8")
    assert item.target is operator.getitem
    copy = Surgery(program, next(iter(item.users))).call(operator.getitem, item.args, "copy")
    list(item.users)[-1].replace_input_with(item, copy)
    deployed = deployment(program).program
    assert "copy" not in {node.name for node in deployed.graph.graph.nodes}
    assert equal(outputs(deployed, checkpoint), expected)


def test_the_table(plain: Callable[[str], Program]) -> None:
    deployed = deployment(plain("deepseek_w4a8"))
    table = fusion_table(deployed)
    columns = list(map(list, zip(*table.rows, strict=True)))
    before, after = deployed.steps[0].calls_before, deployed.steps[-1].calls_after
    assert columns[0] == ["share-quantize", "fuse-norm-quantize", "fuse-swiglu-quantize", "all"]
    assert columns[1] == ["3", "4", "2", "9"]
    assert (columns[2][0], columns[3][-1]) == (str(before), str(after))
    assert columns[4] == ["", f"5 × {WITHOUT_SUM}", "1 × read by quantize_static", ""]
