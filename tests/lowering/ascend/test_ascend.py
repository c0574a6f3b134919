"""The emitted Ascend module: its text, its operator calls, and that it computes what the graph computes."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ascend_folders import (
    Compile,
    bad,
    check_all,
    compile_folder,
    compiled_folders,
    function_text,
    padded_inputs,
    rewritten,
)
from slowness import POLICIES as FEW_POLICIES
from slowness import others_slow
from tiny import write_checkpoint

import fxquant
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.generation.greedy import greedy
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.ascend.emitter.emit import ascend_code
from fxquant.lowering.ascend.operators import KERNELS
from fxquant.lowering.ascend.operators.schemas import SCHEMAS
from fxquant.program.program_file import load_program, save_program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.program_runner import ProgramRunner

POLICIES = sorted(path.stem for path in (Path(fxquant.__file__).parent / "policy" / "shipped").glob("*.yaml"))
GOLDEN = Path(__file__).parent / "golden"
UNIT = 2.0**-24


@pytest.fixture(scope="module")
def compiled(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Compile:
    return compiled_folders(tiny_folder, tmp_path_factory)


# text


@pytest.mark.parametrize("name", ["before", "dense_block", "moe_block", "after"])
def test_golden_text(compiled: Compile, name: str) -> None:
    assert function_text(compiled("deepseek_w4a8").code, name) == (GOLDEN / f"ascend_{name}.txt").read_text()


def test_text_depends_on_the_graph_alone(compiled: Compile, tmp_path: Path) -> None:
    output = compiled("deepseek_w4a8")
    again = rewritten(output.checkpoint, "deepseek_w4a8")
    save_program(again, tmp_path / "graph.json")
    stored = load_program(tmp_path / "graph.json")
    assert output.code == ascend_code(deployment(again).program) == ascend_code(deployment(stored).program)


@pytest.mark.parametrize("policy", others_slow(POLICIES, FEW_POLICIES))
def test_text_is_plain_and_fits_its_lines(compiled: Compile, policy: str) -> None:
    code = compiled(policy).code
    assert max(map(len, code.splitlines())) <= 120
    imported = {n.module for n in ast.walk(ast.parse(code)) if isinstance(n, ast.ImportFrom)}
    imported |= {alias.name for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Import) for alias in n.names}
    standard = {"json", "collections.abc", "dataclasses", "pathlib", "typing"}
    ours = {"torch", "torch.nn", "safetensors", "torch_npu", "fxquant.lowering.ascend.operators"}
    assert imported == standard | ours


def layered(folder: Path, layers: int) -> str:
    """Source for a narrow model of 3 dense layers and MoE layers."""
    narrow = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "q_lora_rank": 16}
    write_checkpoint(folder, num_hidden_layers=layers, first_k_dense_replace=3, vocab_size=64, **narrow)
    return ascend_code(deployment(rewritten(open_checkpoint(folder), "deepseek_w4a8_per_channel")).program)


@pytest.mark.parametrize("layers", [6, pytest.param(61, marks=pytest.mark.slow)])
def test_layers_of_one_structure_share_a_function(tmp_path: Path, layers: int) -> None:
    code = layered(tmp_path, layers)
    names = [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
    structures = (("dense", ""), ("dense", "_2"), ("moe", ""))
    expected = [f"{kind}_block{graph}{count}" for graph in ("", "_prefill", "_decode") for kind, count in structures]
    assert [name for name in names if "block" in name] == expected
    forward = code[code.index("        x, cos, sin = before(") : code.index("        return logits")]
    arguments = "dtype, residual, x, cos, sin, hidden_keys, past[layer]"
    assert forward.splitlines() == [
        '        x, cos, sin = before(w["before"], dtype, input_ids, position_ids)',
        '        residual, x, presents[0] = dense_block(w["model.layers.0"], dtype, x, cos, sin, hidden_keys, past[0])',
        "        for layer in range(1, 3):",
        "            residual, x, presents[layer] = dense_block_2(",
        f'                w[f"model.layers.{{layer}}"], {arguments}',
        "            )",
        f"        for layer in range(3, {layers}):",
        "            residual, x, presents[layer] = moe_block(",
        f'                w[f"model.layers.{{layer}}"], {arguments}',
        "            )",
        '        logits = after(w["after"], dtype, residual, x)',
    ]


# calls


def why_unbound(call: ast.Call) -> str | None:
    """Why a call of `torch.ops.npu.<name>` does not fit the operator's pinned schema."""
    assert isinstance(call.func, ast.Attribute)
    arguments = torch._C.parse_schema(SCHEMAS[call.func.attr]).arguments
    positional = [argument.name for argument in arguments if not argument.kwarg_only]
    if len(call.args) > len(positional):
        return "too many arguments"
    given = [*positional[: len(call.args)], *(keyword.arg for keyword in call.keywords)]
    wrong = [name for name in given if name not in {a.name for a in arguments} or given.count(name) > 1]
    missing = [a.name for a in arguments if not a.has_default_value() and a.name not in given]
    return f"{wrong} {missing}" if wrong or missing else None


def npu_calls(code: str) -> list[ast.Call]:
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).rpartition(".")[0] == "torch.ops.npu"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_engine_call_binds_to_its_schema(compiled: Compile, policy: str) -> None:
    code = compiled(policy).code
    calls = npu_calls(code)
    assert {ast.unparse(call): why for call in calls if (why := why_unbound(call))} == {}
    assert {call.func.attr for call in calls} <= KERNELS.keys()  # type: ignore[attr-defined]
    listed = code[code.index("Engine operators:\n") : code.index("\nUse:")].split()[2:]
    assert sorted({call.func.attr for call in calls}) == listed  # type: ignore[attr-defined]


def test_a_call_that_does_not_bind_is_noticed() -> None:
    calls = npu_calls("torch.ops.npu.npu_rms_norm(x)\ntorch.ops.npu.npu_swiglu(x, dims=1)")
    assert [why_unbound(call) for call in calls] == ["[] ['gamma']", "['dims'] []"]


# numbers


@pytest.mark.parametrize("policy", POLICIES)
def test_every_statement_agrees_with_the_graph(compiled: Compile, policy: str) -> None:
    checks = check_all(compiled(policy))
    assert bad(checks) == {}
    calls = {node.name for node in compiled(policy).deployed.graph.graph.nodes if node.op == "call_function"}
    tuples = ("quantize", "fused", "init_routing", "split_with_sizes", "split_with_sizes_2", "table", "gate", "int32")
    assert {check.node for check in checks} == {name for name in calls if not name.endswith(tuples)}
    exact = {"quantize_static", "moe_init_routing", "embedding", "cat", "split_with_sizes", "add"}
    exact |= {"add_rms_norm_quantize_static"}
    assert all(check.error == check.bound == 0 for check in checks if check.kind in exact)


OPTIONS = [
    ("deepseek_w4a8", {"attention_bias": True}),
    ("deepseek_w4a8_dynamic", {"attention_bias": True, "norm_topk_prob": False}),
    ("deepseek_w4a8", {"q_lora_rank": None, "n_shared_experts": 0}),
    ("deepseek_w4a8", {"dtype": torch.float16}),
    ("deepseek_w4a8", {"fp8": True, "shards": 3}),
]


@pytest.mark.parametrize(("policy", "options"), others_slow(OPTIONS, OPTIONS[:2]), ids=str)
def test_other_shapes_of_the_model_agree(compiled: Compile, policy: str, options: dict[str, Any]) -> None:
    output = compiled(policy, **options)
    assert bad(check_all(output)) == {}
    default = torch.float16 if options.get("dtype") is torch.float16 else torch.bfloat16
    assert output.module().names["Model"].load(output.folder).dtype is default


def test_int4_linears_add_their_bias_last(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    rules = '[{kind: attention, path: "*.kv_b_proj", scheme: FLOAT}, {kind: attention, scheme: W4A8_DYNAMIC}]'
    (tmp_path / "int4.yaml").write_text(f"extends: deepseek_w4a8_per_channel\nrules: {rules}\n")
    output = compile_folder(tiny_folder(attention_bias=True), tmp_path / "out", str(tmp_path / "int4.yaml"))
    assert output.code.count(') + w["self_attn.o_proj.bias"]\n') == 2 * 3  # layers, graphs
    assert bad(check_all(output)) == {}


@pytest.mark.parametrize("policy", ["float", "deepseek_w8a8", "deepseek_w4a8_per_channel"])
def test_the_whole_model_in_float32(compiled: Compile, policy: str) -> None:
    """No operator of these policies rounds more than the graph's, so logits differ by a few float32 roundings."""
    output = compiled(policy)
    inputs = padded_inputs(output.program)
    logits, presents = output.module().names["Model"].load(output.folder, torch.float32)(*inputs[:3], inputs[3:])
    expected, *caches = execute(output.program, output.read(), [inputs])[0]
    for result, reference in zip([logits, *presents], [expected, *caches], strict=True):
        assert (result - reference).abs().max() <= 64 * UNIT * reference.abs().max()


def test_cached_decoding(compiled: Compile) -> None:
    output = compiled("deepseek_w8a8")
    model = output.module().names["Model"].load(output.folder, torch.float32)
    inputs = prefill_inputs(output.program, torch.tensor([[3, 14, 15, 92]]))
    logits, past = model(*inputs[:3], model.empty_past(1))
    tokens = [int(logits[0, -1].argmax())]
    for length in (5, 6):
        step = torch.tensor([[tokens[-1]]]), torch.ones(1, length, dtype=torch.int64), torch.tensor([[length - 1]])
        logits, past = model(*step, past)
        tokens.append(int(logits[0, -1].argmax()))
    steps = greedy(ProgramRunner(output.program, output.read()), [[3, 14, 15, 92]], 3, 128)
    assert tokens == [int(logits.argmax()) for logits in steps]
    assert [tuple(cache.shape) for cache in past] == [(1, 6, 40)] * 2


@pytest.mark.parametrize("policy", ["float", "deepseek_w4a8", "deepseek_w8a8"])
def test_bfloat16_run(compiled: Compile, policy: str) -> None:
    """Each of some 50 operators rounds by up to 2**-8; were all errors alike, they would add up to this."""
    output = compiled(policy)
    inputs = padded_inputs(output.program, past=0)
    model = output.module().names["Model"].load(output.folder)
    logits, presents = model(*inputs[:3], model.empty_past(2))
    assert {tensor.dtype for tensor in (logits, *presents)} == {torch.bfloat16}
    expected = execute(output.program, output.read(), [inputs])[0][0]
    error = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert error.median() <= 50 * 2.0**-8


def test_grouped_int8_scales_follow_the_dtype(compiled: Compile) -> None:
    """npu_grouped_matmul takes bfloat16 scales for bfloat16 results, float32 ones for others."""
    output = compiled("deepseek_w8a8")
    load = output.module().names["Model"].load
    for dtype, scale in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        weights = load(output.folder, dtype).weights["model.layers.1"]
        assert weights["mlp.experts.up_proj.weight_scale"].dtype is scale
        assert weights["mlp.gate.weight"].dtype is torch.float32
        assert weights["self_attn.kv_b_proj.weight"].dtype is dtype
