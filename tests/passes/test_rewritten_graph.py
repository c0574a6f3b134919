"""What the passes leave in the graph."""

from collections import Counter
from collections.abc import Callable

from rewrites import Rewritten, check_registered, every_policy
from tiny import float_program
from torch import Tensor

from fxquant import ops
from fxquant.program.linears import linear_sites
from fxquant.program.node_names import operator_name
from fxquant.program.program import Program
from fxquant.program.text import format_program

# the rewritten graph

OPERATORS = (
    "linear", "moe_experts", "quantize_static", "quantize_per_token", "int_matmul", "int4_matmul",
    "grouped_int_matmul", "grouped_int4_matmul", "dequantize_static", "dequantize_per_token", "grouped_dequantize",
)  # fmt: skip
COUNTS = {
    "deepseek_w4a8": (3, 0, 11, 4, 14, 0, 0, 3, 11, 3, 3),
    "deepseek_w4a8_dynamic": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_dynamic_rotated": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_msmodelslim": (3, 0, 8, 6, 14, 0, 0, 3, 8, 6, 3),
    "deepseek_w4a8_msmodelslim_m4": (3, 0, 8, 6, 14, 0, 0, 3, 8, 6, 3),
    "deepseek_w4a8_msmodelslim_per_channel": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_per_channel": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_per_channel_rotated": (3, 0, 0, 12, 14, 0, 0, 3, 0, 14, 3),
    "deepseek_w4a8_per_channel_static": (3, 0, 8, 6, 14, 0, 0, 3, 8, 6, 3),
    "deepseek_w4a8_shared_w4": (3, 0, 8, 6, 11, 3, 0, 3, 8, 6, 3),
    "deepseek_w8a8": (3, 0, 8, 6, 14, 0, 3, 0, 8, 6, 3),
    "deepseek_w8a8_mix": (3, 0, 8, 6, 14, 0, 3, 0, 8, 6, 3),
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
    assert set(result.rewritten) | set(result.skipped) == set(linears)
    assert set(result.rewritten) == {name for name, module in linears.items() if module in done.program.recipes}
    for name, reason in result.skipped.items():
        assert reason == f"policy: {done.program.rules[linears[name]]}" and reason.endswith("FLOAT")
    experts = done.results["quantize-experts"]
    if policy == "float":
        assert experts.skipped == {"layers_1_mlp_experts": "policy keeps gate_proj, up_proj, down_proj in float"}
    else:
        assert (experts.rewritten, experts.skipped) == (("layers_1_mlp_experts",), {})


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
        consumers = done.node("layers_1_input_layernorm_int8").users
        names = {node.args[1].target for node in consumers}
        assert names == {f"model.layers.1.self_attn.{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")}
    if policy != "float":
        consumers = done.node("layers_0_post_attention_layernorm_int8").users
        assert {node.args[1].target for node in consumers} == {
            "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight",
        }  # fmt: skip


@every_policy
def test_static_linears_keep_their_own_quantization(policy: str, under: Callable[[str], Rewritten]) -> None:
    program = under(policy).program
    static = [module for module, recipe in program.recipes.items() if recipe.scheme.static]
    owned = [[argument.target for argument in node.args[1:]] for node in program.nodes(ops.quantize_static)]
    assert sorted(owned) == sorted([f"{module}.input_scale", f"{module}.input_offset"] for module in static)


@every_policy
def test_no_float_weight_stays_registered(policy: str, under: Callable[[str], Rewritten]) -> None:
    check_registered(under(policy).program)
