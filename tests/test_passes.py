"""The rewrite, pass by pass: what becomes what, what stays and why, and that the integers are those of the formulas."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import traced
from tiny import float_program, meta_model, random_ids, tiny_config
from torch import Tensor, fx

from fxquant import ops
from fxquant.checkpoint import Checkpoint
from fxquant.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.execute import execute, prefill_inputs
from fxquant.kinds import Kind
from fxquant.models import DecoderLayer
from fxquant.models.deepseek_v3 import MLP
from fxquant.naming import operator_name
from fxquant.passes import (
    AssignSchemes,
    Calibrate,
    CheckCoverage,
    Pass,
    PassResult,
    QuantizeExperts,
    QuantizeLinear,
    pipeline,
    run_passes,
)
from fxquant.passes.linears import linear_sites
from fxquant.policy import load_policy, shipped_policies
from fxquant.printing import format_program
from fxquant.program import Program
from fxquant.reference import expected_tensors
from fxquant.schemes import Recipe, Scheme
from fxquant.tracing import trace
from fxquant.weights import RecipeReader

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
    passes = pipeline(AssignSchemes(loaded), Calibrate(loaded, checkpoint.read, lambda: CALIBRATION))
    results = {result.name: result for result in run_passes(program, passes)}
    values: dict[str, Any] = {}
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 9))
    reader = RecipeReader(program, checkpoint)
    execute(program, reader, [batch], lambda node, outputs: values.update({node.name: outputs[0]}))
    return Rewritten(checkpoint, program, results, values)


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def under(checkpoint: Checkpoint) -> Callable[[str], Rewritten]:
    """`under("deepseek_w8a8")`: the tiny model rewritten, once a policy."""
    done: dict[str, Rewritten] = {}

    def get(policy: str) -> Rewritten:
        if policy not in done:
            done[policy] = rewrite(checkpoint, policy)
        return done[policy]

    return get


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
    return trace(meta_model(checkpoint), checkpoint)


every_policy = pytest.mark.parametrize("policy", shipped_policies())


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
        256, 256, False, True, torch.bfloat16,
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
            {"moe_intermediate_size": 128}, "deepseek_w4a8", "experts.down_proj",
            "in_features 128 is not a multiple of group_size 256", "group_size: 128",
        ),
        (
            {"moe_intermediate_size": 320}, "deepseek_w4a8", "experts.down_proj",
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


# the rewritten graph

OPERATORS = (
    "linear", "moe_experts", "quantize_static", "quantize_per_token", "int_matmul", "int4_matmul",
    "grouped_int_matmul", "grouped_int4_matmul", "dequantize_static", "dequantize_per_token", "grouped_dequantize",
)  # fmt: skip
COUNTS = {
    "deepseek_w4a8": (3, 0, 11, 4, 14, 0, 0, 3, 11, 3, 3),
    "deepseek_w4a8_dynamic": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_msmodelslim": (3, 0, 8, 6, 14, 0, 0, 3, 8, 6, 3),
    "deepseek_w4a8_per_channel": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_per_channel_static": (3, 0, 8, 6, 14, 0, 0, 3, 8, 6, 3),
    "deepseek_w4a8_shared_w4": (3, 0, 8, 6, 11, 3, 0, 3, 8, 6, 3),
    "deepseek_w8a8": (3, 0, 8, 6, 14, 0, 3, 0, 8, 6, 3),
    "float": (17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0),
}


@every_policy
def test_operators_of_the_rewritten_graph(policy: str, under: Callable[[str], Rewritten]) -> None:
    nodes = under(policy).program.graph.graph.nodes
    counts = Counter(operator_name(node) for node in nodes if node.op == "call_function")
    assert tuple(counts[name] for name in OPERATORS) == COUNTS[policy]


DENSE_MLP = """
post_attention_layernorm_int8: i8[batch, sequence, 256], post_attention_layernorm_scale: f32[batch, sequence, 1] = quantize_per_token(post_attention_layernorm)
mlp_gate_proj_int32: i32[batch, sequence, 256] = int_matmul(post_attention_layernorm_int8, ‹mlp.gate_proj.weight›)
mlp_gate_proj: f32[batch, sequence, 256] = dequantize_per_token(mlp_gate_proj_int32, post_attention_layernorm_scale, ‹mlp.gate_proj.weight_scale›)
mlp_up_proj_int32: i32[batch, sequence, 256] = int_matmul(post_attention_layernorm_int8, ‹mlp.up_proj.weight›)
mlp_up_proj: f32[batch, sequence, 256] = dequantize_per_token(mlp_up_proj_int32, post_attention_layernorm_scale, ‹mlp.up_proj.weight_scale›)
mlp_swiglu: f32[batch, sequence, 256] = swiglu(mlp_gate_proj, mlp_up_proj)
mlp_swiglu_int8: i8[batch, sequence, 256], mlp_swiglu_scale: f32[batch, sequence, 1] = quantize_per_token(mlp_swiglu)
mlp_down_proj_int32: i32[batch, sequence, 256] = int_matmul(mlp_swiglu_int8, ‹mlp.down_proj.weight›)
mlp_down_proj: f32[batch, sequence, 256] = dequantize_per_token(mlp_down_proj_int32, mlp_swiglu_scale, ‹mlp.down_proj.weight_scale›)
"""  # noqa: E501
EXPERTS = """
mlp_experts_rows: f32[2·batch·sequence, 256], mlp_experts_row_index: i64[2·batch·sequence], mlp_experts_counts: i64[8] = moe_init_routing(post_attention_layernorm, mlp_gate_0, 8)
mlp_experts_rows_int8: i8[2·batch·sequence, 256], mlp_experts_rows_scale: f32[2·batch·sequence, 1] = quantize_per_token(mlp_experts_rows)
mlp_experts_gate_proj_int32: i32[2·batch·sequence, 256] = grouped_int4_matmul(mlp_experts_rows_int8, ‹mlp.experts.gate_proj.weight ×8›, mlp_experts_counts, ‹mlp.experts.gate_proj.weight_scale_second ×8›)
mlp_experts_gate_proj: f32[2·batch·sequence, 256] = grouped_dequantize(mlp_experts_gate_proj_int32, mlp_experts_rows_scale, ‹mlp.experts.gate_proj.weight_scale ×8›, mlp_experts_counts)
mlp_experts_up_proj_int32: i32[2·batch·sequence, 256] = grouped_int4_matmul(mlp_experts_rows_int8, ‹mlp.experts.up_proj.weight ×8›, mlp_experts_counts, ‹mlp.experts.up_proj.weight_scale_second ×8›)
mlp_experts_up_proj: f32[2·batch·sequence, 256] = grouped_dequantize(mlp_experts_up_proj_int32, mlp_experts_rows_scale, ‹mlp.experts.up_proj.weight_scale ×8›, mlp_experts_counts)
mlp_experts_swiglu: f32[2·batch·sequence, 256] = swiglu(mlp_experts_gate_proj, mlp_experts_up_proj)
mlp_experts_swiglu_int8: i8[2·batch·sequence, 256], mlp_experts_swiglu_scale: f32[2·batch·sequence, 1] = quantize_per_token(mlp_experts_swiglu)
mlp_experts_down_proj_int32: i32[2·batch·sequence, 256] = grouped_int4_matmul(mlp_experts_swiglu_int8, ‹mlp.experts.down_proj.weight ×8›, mlp_experts_counts, ‹mlp.experts.down_proj.weight_scale_second ×8›)
mlp_experts_down_proj: f32[2·batch·sequence, 256] = grouped_dequantize(mlp_experts_down_proj_int32, mlp_experts_swiglu_scale, ‹mlp.experts.down_proj.weight_scale ×8›, mlp_experts_counts)
mlp_experts: f32[batch, sequence, 256] = moe_finalize_routing(mlp_experts_down_proj, mlp_experts_row_index, mlp_gate_1)
"""  # noqa: E501


def lines_between(program: Program, block: str, after: str, last: str) -> list[str]:
    """Lines of a block from the one behind `after = …` to `last = …`."""
    lines = list(format_program(program, block))
    (start,) = (i for i, line in enumerate(lines) if line.startswith(after))
    (end,) = (i for i, line in enumerate(lines) if line.startswith(f"{last}: "))
    return lines[start + 1 : end + 1]


def test_a_dense_mlp_as_text(under: Callable[[str], Rewritten]) -> None:
    program = under("deepseek_w4a8").program
    lines = lines_between(program, "model.layers.0", "post_attention_layernorm: ", "mlp_down_proj")
    assert lines == DENSE_MLP.strip().split("\n")


def test_routed_experts_as_text(under: Callable[[str], Rewritten]) -> None:
    program = under("deepseek_w4a8").program
    assert lines_between(program, "model.layers.1", "mlp_gate_0", "mlp_experts") == EXPERTS.strip().split("\n")


@every_policy
def test_passes_say_what_they_rewrote_and_why_they_kept_the_rest(
    policy: str, under: Callable[[str], Rewritten]
) -> None:
    done = under(policy)
    sites = list(linear_sites(float_program(done.checkpoint)))
    linears = {site.node.name: site.module for site in sites if site.node.target == ops.linear}
    result = done.results["quantize-linear"]
    assert set(result.rewritten) | set(result.kept) == set(linears)
    assert set(result.rewritten) == {name for name, module in linears.items() if module in done.program.recipes}
    for name, reason in result.kept.items():
        assert reason == f"policy: {done.program.rules[linears[name]]}" and reason.endswith("FLOAT")
    experts = done.results["quantize-experts"]
    if policy == "float":
        assert experts.kept == {"layers_1_mlp_experts": "policy keeps gate_proj, up_proj, down_proj in float"}
    else:
        assert (experts.rewritten, experts.kept) == (("layers_1_mlp_experts",), {})


@every_policy
def test_a_rewritten_linear_keeps_its_name_and_place(policy: str, under: Callable[[str], Rewritten]) -> None:
    done = under(policy)
    names = [node.name for node in done.program.graph.graph.nodes]
    assert len(names) == len(set(names)) and set(names) - {"output"} <= done.program.names
    for before in float_program(done.checkpoint).graph.graph.nodes:
        if before.op == "call_function":
            after = done.node(before.name)
            assert [after.meta[key] for key in ("module", "kind", "block")] == [
                before.meta[key] for key in ("module", "kind", "block")
            ]


@every_policy
def test_only_leading_sizes_are_dynamic(policy: str, under: Callable[[str], Rewritten]) -> None:
    """A feature size that turned into a symbol would be called batch or sequence by whoever lowers it."""
    for node in under(policy).program.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "get_attr":
            assert all(type(size) is int for size in value.shape), node.name
        elif isinstance(value, Tensor) and value.ndim == 3:
            assert type(value.shape[2]) is int, node.name


@every_policy
def test_linears_of_one_input_share_its_per_token_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    done = under(policy)
    quantized = [node.args[0].name for node in done.program.nodes(ops.quantize_per_token)]
    assert len(quantized) == len(set(quantized))
    dynamic = COUNTS[policy][2] == 0 and policy != "float"
    assert ("layers_1_input_layernorm" in quantized) is dynamic
    if dynamic:
        readers = done.node("layers_1_input_layernorm_int8").users
        names = {node.args[1].target for node in readers}
        assert names == {f"model.layers.1.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    if policy != "float":
        readers = done.node("layers_0_post_attention_layernorm_int8").users
        assert {node.args[1].target for node in readers} == {
            "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
        }  # fmt: skip


@every_policy
def test_static_linears_keep_their_own_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    program = under(policy).program
    static = [module for module, recipe in program.recipes.items() if recipe.scheme is Scheme.W8A8]
    owned = [[argument.target for argument in node.args[1:]] for node in program.nodes(ops.quantize_static)]
    assert sorted(owned) == sorted([f"{module}.input_scale", f"{module}.input_offset"] for module in static)


def check_registered(program: Program) -> None:
    """On the module are the tensors that the graph reads, on meta, and what a recipe makes is there as it is stored."""
    read = {node.target for node in program.graph.graph.nodes if node.op == "get_attr"}
    buffers = dict(program.graph.named_buffers())
    assert set(buffers) == set(program.parameters) == read
    assert not list(program.graph.named_parameters())
    assert all(buffer.device.type == "meta" for buffer in buffers.values())
    for module, recipe in program.recipes.items():
        assert buffers[f"{module}.weight"].dtype is torch.int8, module
        packed = recipe.scheme is Scheme.W4A8_DYNAMIC
        rows = recipe.out_features // 2 if packed else recipe.out_features
        assert tuple(buffers[f"{module}.weight"].shape[-2:]) == (rows, recipe.in_features)
        parameter = program.parameters[f"{module}.weight"]
        assert parameter.names == tuple(f"{name}.weight" for name in recipe.modules)


@every_policy
def test_no_float_weight_stays_registered(policy: str, under: Callable[[str], Rewritten]) -> None:
    check_registered(under(policy).program)


# the numbers


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


def per_token(x: Tensor) -> Tensor:
    """int64 `rne(x * (127 / max|x|))`, in float32."""
    return torch.round(x * (127 / x.abs().amax(-1, keepdim=True))).long()


def check_linear(done: Rewritten, recipe: Recipe) -> None:
    """Integers with ==, the float result against float64."""
    values, checkpoint, module = done.values, done.checkpoint, recipe.module
    dequantize = done.node(module.removeprefix("model.").replace(".", "_"))
    matmul = dequantize.args[0]
    x8, weight = values[matmul.args[0].name], integers_of(recipe, module, checkpoint)
    assert torch.equal(values[matmul.name].double(), x8.double() @ weight[0].double().T), module
    quantize = matmul.args[0] if recipe.scheme.static else matmul.args[0].args[0]
    x = values[quantize.args[0].name]
    if recipe.scheme.static:
        scale, offset = static_parameters(recipe)
        expected = torch.round(x / scale.float() + offset.float()).clamp(-128, 127)
        whole, step = x8.double() - offset.double(), scale.double()
    else:
        expected = per_token(x)
        whole, step = x8.double(), (x.abs().amax(-1, keepdim=True) / 127).double()
    assert torch.equal(x8.long(), expected.long()), module
    product = (whole @ weight[0].double().T) * step * weight[1]
    bias = checkpoint.read(f"{module}.bias").double() if recipe.bias else torch.zeros(len(weight[1])).double()
    # every integer is exact, its float32 conversion too (below 2**24); deq_scale, the product and the sum with a bias
    # are rounded, and a folded bias is first rounded to a whole number of steps
    bound = 3 * ULP * (product.abs() + bias.abs())
    if recipe.bias and recipe.scheme.static:
        bound += 0.5 * step * weight[1] * (1 + 4 * ULP) + 2 * ULP * bias.abs()
    assert ((values[dequantize.name] - (product + bias)).abs() <= bound).all(), module


def static_parameters(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """input_scale and input_offset of a range in bfloat16 arithmetic."""
    low, high = min(recipe.activation.low, 0), max(recipe.activation.high, 0)
    assert recipe.activation.arithmetic is torch.bfloat16
    scale = (torch.tensor(high).bfloat16() - torch.tensor(low).bfloat16()) / 255
    return scale, torch.round(-torch.tensor(low).bfloat16() / scale) - 128


@every_policy
def test_every_rewritten_linear_computes_its_fake_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    done = under(policy)
    recipes = [recipe for recipe in done.program.recipes.values() if recipe.modules == (recipe.module,)]
    assert len(recipes) == (0 if policy == "float" else 14)
    for recipe in recipes:
        check_linear(done, recipe)


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_dynamic"])
def test_linears_with_a_bias_compute_theirs(policy: str, tiny: Callable[..., Checkpoint]) -> None:
    done = rewrite(tiny(attention_bias=True), policy)
    biased = [recipe for recipe in done.program.recipes.values() if recipe.bias]
    assert len(biased) == 6
    for recipe in biased:
        check_linear(done, recipe)
    check_registered(done.program)  # a bias that was folded into quant_bias is gone
    assert (f"{biased[0].module}.bias" in done.program.parameters) is (policy == "deepseek_w4a8_dynamic")


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w8a8"])
def test_routed_experts_compute_their_fake_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    done, prefix = under(policy), "layers_1_mlp_experts_"
    values = {name.removeprefix(prefix): value for name, value in done.values.items()}
    x, weights = values["layers_1_post_attention_layernorm"].flatten(0, 1), values["layers_1_mlp_gate_1"].flatten(0, 1)
    ids, row_index = values["layers_1_mlp_gate_0"].flatten(0, 1), values["row_index"].view(-1, 2)
    recipes = {name: done.program.recipes[f"model.layers.1.mlp.experts.{name}_proj"] for name in ("gate", "up", "down")}
    table = {
        (name, expert): integers_of(recipe, recipe.modules[expert], done.checkpoint)
        for name, recipe in recipes.items()
        for expert in range(8)
    }
    assert len(set(ids.flatten().tolist())) > 4
    result = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(len(x)):
        for slot in range(2):
            row, expert = row_index[token, slot], int(ids[token, slot])
            hidden = {}
            x8 = per_token(x[token])
            assert torch.equal(values["rows_int8"][row].long(), x8)
            for name in ("gate", "up"):
                codes, scale = table[name, expert]
                assert torch.equal(values[f"{name}_proj_int32"][row].long(), codes @ x8)
                hidden[name] = (codes @ x8).double() * scale * (x[token].abs().max() / 127).double()
                # two float32 products
                close(values[f"{name}_proj"][row], hidden[name], 3 * ULP)
            gate, up = (values[f"{name}_proj"][row].double() for name in ("gate", "up"))
            swiglu = values["swiglu"][row]
            # exp, sum, quotient and product in float32, exp to two units
            close(swiglu, gate / (1 + (-gate).exp()) * up, 8 * ULP)
            h8, (codes, scale) = per_token(swiglu), table["down", expert]
            assert torch.equal(values["swiglu_int8"][row].long(), h8)
            assert torch.equal(values["down_proj_int32"][row].long(), codes @ h8)
            down = (codes @ h8).double() * scale * (swiglu.abs().max() / 127).double()
            close(values["down_proj"][row], down, 3 * ULP)
            result[token] += weights[token, slot].double() * values["down_proj"][row].double()
    terms = (weights.double().unsqueeze(-1) * values["down_proj"][row_index].double()).abs().sum(1)
    # two products and their sum in float32
    assert ((done.values["layers_1_mlp_experts"].flatten(0, 1) - result).abs() <= 3 * ULP * terms).all()


def close(value: Tensor, exact: Tensor, relative: float) -> None:
    assert ((value.double() - exact).abs() <= relative * exact.abs()).all()


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w8a8"])
def test_the_rewritten_model_is_near_the_float_model(
    policy: str, under: Callable[[str], Rewritten], checkpoint: Checkpoint
) -> None:
    """Only that nothing is badly wired: the logits still correlate."""
    program = float_program(checkpoint)
    batch = prefill_inputs(program, random_ids(meta_model(checkpoint), 2, 9))
    exact = execute(program, checkpoint.read, [batch])[0][0].flatten()
    found = under(policy).values["lm_head"].flatten()
    # measured 0.98 and above; unrelated logits of this size correlate below 0.1
    assert torch.corrcoef(torch.stack((exact, found)))[0, 1] > 0.9


# subclasses


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
    kept = QuantizeLinear()(program).kept
    assert "its weight is computed" in kept.values()
    assert "model.layers.0.mlp.up_proj" not in program.recipes


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
        lambda node, values: extremes.extend([values[0].min(), values[0].max()] if node in inputs else []),
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
    with pytest.raises(FxquantError, match=r"model\.layers\.0\.mlp\.gate_proj: has a recipe and is still float"):
        CheckCoverage()(program)


def test_experts_left_in_float_are_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "deepseek_w4a8_dynamic")
    QuantizeLinear()(program)
    with pytest.raises(FxquantError, match=r"mlp\.experts\S*: has a recipe and is still float"):
        CheckCoverage()(program)


def test_experts_quantized_in_part_are_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """One fused node reads all three projections: it is rewritten whole or not at all."""
    policy = "extends: deepseek_w4a8_dynamic\nrules: [{path: '*.experts.down_proj', scheme: FLOAT}]"
    program = assigned(float_program(checkpoint), policy, tmp_path)
    QuantizeLinear()(program)
    kept = QuantizeExperts()(program).kept
    assert kept == {"layers_1_mlp_experts": "policy keeps down_proj in float"}
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
    with pytest.raises(FxquantError, match="stray: has a recipe but no node reads its integers"):
        CheckCoverage()(program)


def test_a_node_without_a_checked_shape_is_a_fault(checkpoint: Checkpoint) -> None:
    program = assigned(float_program(checkpoint), "float")
    del program.nodes(ops.swiglu)[0].meta["val"]
    with pytest.raises(FxquantError, match="layers_0_mlp_swiglu: has no checked shape"):
        CheckCoverage()(program)


# the contract of a pass


class DoubleEverySwiglu(Pass):
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
    kept = {"layers_1_mlp_shared_experts_swiglu": "not in layer 0"}
    assert DoubleEverySwiglu()(program) == PassResult("double", ("layers_0_mlp_swiglu",), kept)


def test_the_module_runs_the_graph_that_a_pass_leaves(checkpoint: Checkpoint) -> None:
    alone, listed = float_program(checkpoint), float_program(checkpoint)
    before = alone.graph.code.count("aten.add.Tensor")
    DoubleEverySwiglu()(alone)
    run_passes(listed, [DoubleEverySwiglu(), DoubleEverySwiglu()])
    assert [program.graph.code.count("aten.add.Tensor") - before for program in (alone, listed)] == [1, 2]


def test_a_pass_without_rules_says_so(checkpoint: Checkpoint) -> None:
    class Unfinished(Pass):
        name = "unfinished"

    with pytest.raises(TypeError, match="Unfinished does not say which nodes"):
        Unfinished()(float_program(checkpoint))
