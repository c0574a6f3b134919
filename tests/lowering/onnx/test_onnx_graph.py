"""The ONNX target: whole models of every policy, what they compute and what their files say."""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx_calls import integers
from onnx_graphs import Emitted, assert_operators_agree, check_everything, emit, quantized
from slowness import POLICIES as FEW_POLICIES
from slowness import others_slow

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.lowering.onnx.builder import DOMAIN
from fxquant.lowering.onnx.runner import products_saturate, session_options
from fxquant.policy.policy import shipped_policies
from fxquant.runtime.execute import prefill_inputs
from fxquant.storage.safetensors import read_header


@pytest.fixture(scope="session")
def emitted(tiny: Callable[..., Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emitted]:
    """`emitted(policy, **checkpoint options)`, made once."""

    @functools.cache
    def make(policy: str, **options: Any) -> Emitted:
        checkpoint = tiny(**options)
        return emit(quantized(checkpoint, policy), checkpoint, tmp_path_factory.mktemp("onnx"))

    return make


POLICIES = shipped_policies()
VARIANTS = [
    ("deepseek_w4a8", {"dtype": torch.float16}),
    ("deepseek_w4a8", {"attention_bias": True, "q_lora_rank": None}),
    ("deepseek_w4a8_dynamic", {"attention_bias": True}),
    ("float", {"dtype": torch.float32, "n_shared_experts": 0}),
]


@pytest.mark.parametrize("policy", others_slow(POLICIES, FEW_POLICIES))
def test_every_policy(emitted: Callable[..., Emitted], policy: str):
    check_everything(emitted(policy))


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "options"), VARIANTS)
def test_variants(emitted: Callable[..., Emitted], policy: str, options: dict[str, Any]):
    check_everything(emitted(policy, **options))


def test_few_tokens_leave_experts_empty(emitted: Callable[..., Emitted]):
    for policy in ("deepseek_w4a8", "float"):
        model = emitted(policy)
        ids = integers(0, 100, 1, 1, dtype=torch.int64, seed=7)
        assert_operators_agree(model, prefill_inputs(model.program, ids))


def test_weights_lie_in_their_files(emitted: Callable[..., Emitted]):
    output = emitted("deepseek_w4a8")
    model = onnx.load(output.folder / "model.onnx", load_external_data=False)
    infos = {}
    for file in ("weights-0.safetensors", "weights-1.safetensors"):
        infos |= read_header(output.folder / file)
    graphs = [model.graph]
    initializers = {}
    while graphs:
        graph = graphs.pop()
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
        initializers |= {tensor.name: tensor for tensor in graph.initializer}
    assert initializers.keys() == {name for p in output.program.parameters.values() for name in p.names}
    for name, tensor in initializers.items():
        place = {entry.key: entry.value for entry in tensor.external_data}
        info = infos[name]
        assert tensor.data_location == onnx.TensorProto.EXTERNAL and not tensor.raw_data
        assert place == {"location": info.file.name, "offset": str(info.start), "length": str(info.nbytes)}
    weights = sum((output.folder / f"weights-{file}.safetensors").stat().st_size for file in range(2))
    assert (output.folder / "model.onnx").stat().st_size < weights / 10


def test_the_model_says_what_it_is(emitted: Callable[..., Emitted]):
    model = onnx.load(emitted("deepseek_w4a8").folder / "model.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21), ("fxquant", 1)]
    assert (model.ir_version, model.producer_name) == (10, "fxquant")
    notes = {prop.key: prop.value for prop in model.metadata_props}
    assert notes["producer"] == "fxquant" and "become int8 in memory" in notes["numerics"]
    assert model.doc_string and all(value.doc_string for value in (*model.graph.input, *model.graph.output))
    meanings = {function.name: function.doc_string for function in model.functions}
    assert "with m the largest magnitude of the row" in meanings["expert_quantize_per_token"]
    assert [name for name, meaning in meanings.items() if not meaning] == ["routed_expert"]
    inputs = {
        input_.name: [d.dim_param or d.dim_value for d in input_.type.tensor_type.shape.dim]
        for input_ in model.graph.input
    }
    outputs = {o.name: [d.dim_param or d.dim_value for d in o.type.tensor_type.shape.dim] for o in model.graph.output}
    assert inputs == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "total"],
        "position_ids": ["batch", "sequence"],
        "past_key_values.0.latent": ["batch", "past", 40],
        "past_key_values.1.latent": ["batch", "past", 40],
    }
    assert outputs == {
        "logits": ["batch", "sequence", 128],
        "present.0.latent": ["batch", "total", 40],
        "present.1.latent": ["batch", "total", 40],
    }


MOE_LAYER = """
layers_1_mlp_gate_router_logits = router_logits
layers_1_mlp_gate = moe_gate
layers_1_mlp_experts_init_routing = moe_init_routing
layers_1_mlp_experts_down_proj = CumSum Sub Gather Less Split If Concat
layers_1_mlp_experts = moe_finalize_routing
layers_1_mlp_shared_experts_gate_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_gate_proj_int32 = int_matmul
layers_1_mlp_shared_experts_gate_proj = dequantize_static
layers_1_mlp_shared_experts_up_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_up_proj_int32 = int_matmul
layers_1_mlp_shared_experts_up_proj = dequantize_static
layers_1_mlp_shared_experts_swiglu = swiglu
layers_1_mlp_shared_experts_down_proj_input_int8 = quantize_static
layers_1_mlp_shared_experts_down_proj_int32 = int_matmul
layers_1_mlp_shared_experts_down_proj = dequantize_static
layers_1_mlp_add = Add
"""
EXPERT = """
[0] = expert_quantize_per_token(rows)
[1] = expert_int4_matmul([0], gate_proj_weight, gate_proj_weight_scale_second)
[2] = expert_dequantize_per_token([1], [0], gate_proj_weight_scale)
[3] = expert_int4_matmul([0], up_proj_weight, up_proj_weight_scale_second)
[4] = expert_dequantize_per_token([3], [0], up_proj_weight_scale)
[5] = expert_swiglu([2], [4])
[6] = expert_quantize_per_token([5])
[7] = expert_int4_matmul([6], down_proj_weight, down_proj_weight_scale_second)
[8] = expert_dequantize_per_token([7], [6], down_proj_weight_scale)
"""


def test_the_graph_mirrors_the_fx_graph(emitted: Callable[..., Emitted]):
    model = onnx.load(emitted("deepseek_w4a8").folder / "model.onnx", load_external_data=False)
    units: dict[str, list[str]] = {}
    for node in model.graph.node:
        units.setdefault(node.name.partition("/")[0], []).append(node.op_type)
    lines = (
        f"{name} = {' '.join(dict.fromkeys(t for t in types if t != 'Constant'))}" for name, types in units.items()
    )
    assert "\n" + "\n".join(line for line in lines if line.startswith("layers_1_mlp")) + "\n" == MOE_LAYER
    function = next(definition for definition in model.functions if definition.name == "routed_expert")
    calls = [node for node in function.node if node.domain == DOMAIN]
    texts = {output: f"[{index}]" for index, node in enumerate(calls) for output in node.output}
    texts |= {node.output[0]: node.input[0] for node in function.node if node.op_type == "Cast"}
    text = [f"[{i}] = {n.op_type}({', '.join(texts.get(x, x) for x in n.input)})" for i, n in enumerate(calls)]
    assert "\n" + "\n".join(text) + "\n" == EXPERT
    assert sum(definition.name.startswith("routed_expert") for definition in model.functions) == 1


def test_integers_stay_integers_when_onnxruntime_has_optimized(emitted: Callable[..., Emitted], tmp_path: Path):
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(emitted("deepseek_w4a8_shared_w4").folder / "model.onnx", options)
    model = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
    then = next(graph for graph in _branches(model.graph) if all(node.op_type != "If" for node in graph.node))
    assert [node.op_type for node in then.node].count("MatMulInteger") == 3
    for graph in (model.graph, then):
        dtypes = {initializer.name: initializer.data_type for initializer in graph.initializer}
        products = [node for node in graph.node if node.op_type == "MatMulInteger"]
        eight_bits = onnx.TensorProto.UINT8 if products_saturate() else onnx.TensorProto.INT8  # 128 added to both
        assert products and all(dtypes[node.input[1]] == eight_bits for node in products)
        assert onnx.TensorProto.INT4 not in dtypes.values(), "unpacked once, when the session is made"


def _branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Branches that run over rows, a group's before those of its experts."""
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "If" and attribute.g.name == "rows":
                yield attribute.g
                yield from _branches(attribute.g)


def test_the_probe_sees_saturation(monkeypatch: pytest.MonkeyPatch):
    assert products_saturate() in (False, True)
    lossy = lambda *_, **__: SimpleNamespace(run=lambda *_: [np.full((4, 16), 64 * 32767 // 2)])  # noqa: E731
    monkeypatch.setattr(onnxruntime, "InferenceSession", lossy)
    assert products_saturate.__wrapped__()


def test_same_program_same_bytes(emitted: Callable[..., Emitted], tiny: Callable[..., Checkpoint], tmp_path: Path):
    again = emit(quantized(tiny(), "deepseek_w4a8"), tiny(), tmp_path)
    assert (again.folder / "model.onnx").read_bytes() == (emitted("deepseek_w4a8").folder / "model.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.onnx",
        "weights-0.safetensors",
        "weights-1.safetensors",
    ]
