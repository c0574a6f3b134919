"""The graph of a tiny model: what it says, where its weights are, and that it computes what the module computes."""

from collections.abc import Callable
from typing import Any

import pytest
from graphs import DENSE_LAYER, equal, flat, run, text
from tiny import inputs, load_model, meta_model, random_ids

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program
from fxquant.storage.safetensors import TensorInfo
from fxquant.tracing import trace

MOE_MLP = """
mlp_gate_router_logits = router_logits(post_attention_layernorm, mlp_gate_weight)
mlp_gate = moe_gate(mlp_gate_router_logits, mlp_gate_e_score_correction_bias, 2, 4, 2, True, 2.5)
mlp_gate_0 = getitem(mlp_gate, 0)
mlp_gate_1 = getitem(mlp_gate, 1)
mlp_experts = moe_experts(post_attention_layernorm, mlp_gate_0, mlp_gate_1, mlp_experts_gate_proj_weight, mlp_experts_up_proj_weight, mlp_experts_down_proj_weight)
mlp_shared_experts_gate_proj = linear(post_attention_layernorm, mlp_shared_experts_gate_proj_weight)
mlp_shared_experts_up_proj = linear(post_attention_layernorm, mlp_shared_experts_up_proj_weight)
mlp_shared_experts_swiglu = swiglu(mlp_shared_experts_gate_proj, mlp_shared_experts_up_proj)
mlp_shared_experts_down_proj = linear(mlp_shared_experts_swiglu, mlp_shared_experts_down_proj_weight)
mlp_add = add(mlp_experts, mlp_shared_experts_down_proj)
add_1 = add(add, mlp_add)
"""  # noqa: E501


@pytest.fixture(scope="module")
def checkpoint(tiny: Callable[..., Checkpoint]) -> Checkpoint:
    return tiny()


@pytest.fixture(scope="module")
def program(checkpoint: Checkpoint) -> Program:
    return trace(meta_model(checkpoint), checkpoint)


# the graph


def test_dense_layer_as_text(program: Program) -> None:
    assert text(program, "model.layers.0") == DENSE_LAYER


def test_moe_layer_as_text(program: Program) -> None:
    attention = DENSE_LAYER[: DENSE_LAYER.index("mlp_gate_proj")]
    attention = attention.replace("embed_tokens", "layers_0_add_1").replace("past_0", "past_1")
    assert text(program, "model.layers.1") == attention + MOE_MLP.lstrip()


def test_before_and_after_the_layers(program: Program) -> None:
    assert text(program, "before") == (
        "\nrope_table = rope_table(position_ids, [1.0, 0.10000000149011612, 0.009999999776482582, "
        "0.0010000000474974513], 1.0)\nrope_table_0 = getitem(rope_table, 0)\nrope_table_1 = getitem(rope_table, 1)\n"
        "embed_tokens = embedding(embed_tokens_weight, input_ids)\n"
    )
    assert text(program, "after") == (
        "\nnorm = rms_norm(layers_1_add_1, norm_weight, 1e-06)\nlm_head = linear(norm, lm_head_weight)\n"
    )


def test_inputs_and_outputs(program: Program) -> None:
    placeholders = program.graph.graph.find_nodes(op="placeholder")
    assert [node.name for node in placeholders] == ["input_ids", "attention_mask", "position_ids", "past_0", "past_1"]
    output = program.graph.graph.output_node()
    assert [node.name for node in output.args[0]] == ["lm_head", "layers_0_self_attn_cat_1", "layers_1_self_attn_cat_1"]


def test_every_call_knows_its_module_kind_and_shape(program: Program) -> None:
    kinds = {node.name: (node.meta["module"], node.meta["kind"]) for node in program.graph.graph.nodes}
    assert kinds["embed_tokens"] == ("model.embed_tokens", Kind.EMBEDDING)
    assert kinds["layers_0_self_attn_q_a_proj"] == ("model.layers.0.self_attn.q_a_proj", Kind.ATTENTION)
    assert kinds["layers_0_self_attn_q_a_layernorm"] == ("model.layers.0.self_attn.q_a_layernorm", Kind.NORM)
    assert kinds["layers_0_mlp_up_proj"] == ("model.layers.0.mlp.up_proj", Kind.DENSE_MLP)
    assert kinds["layers_0_add_1"] == ("model.layers.0", Kind.OTHER)
    assert kinds["layers_1_mlp_gate"] == ("model.layers.1.mlp.gate", Kind.GATE)
    assert kinds["layers_1_mlp_experts"] == ("model.layers.1.mlp.experts", Kind.ROUTED_EXPERT)
    assert kinds["layers_1_mlp_shared_experts_swiglu"] == ("model.layers.1.mlp.shared_experts", Kind.SHARED_EXPERT)
    assert kinds["lm_head"] == ("lm_head", Kind.HEAD)
    assert all("val" in node.meta for node in program.graph.graph.nodes if node.op != "output")


def test_tracing_twice_gives_the_same_text(checkpoint: Checkpoint, program: Program) -> None:
    again = trace(meta_model(checkpoint), checkpoint)
    assert (str(again.graph.graph), again.parameters) == (str(program.graph.graph), program.parameters)


# weights


def test_no_weight_is_in_memory(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> bytearray:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(TensorInfo, "read_bytes", refuse)
    program = trace(meta_model(checkpoint), checkpoint)
    tensors = program.graph.tensors
    assert set(tensors) == set(program.parameters)
    assert all(tensor.is_meta for tensor in tensors.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"first_k_dense_replace": 0},
        {"n_shared_experts": 2},
        {"fp8": True},
    ],
    ids=str,
)
def test_parameters_are_the_checkpoints_tensors_one_to_one(
    tiny: Callable[..., Checkpoint], options: dict[str, Any]
) -> None:
    checkpoint = tiny(**options)
    program = trace(meta_model(checkpoint), checkpoint)
    names = [name for parameter in program.parameters.values() for name in parameter.names]
    assert sorted(names) == sorted(checkpoint.tensors)
    buffers = program.graph.tensors
    for target, parameter in program.parameters.items():
        shapes = {checkpoint.tensors[name].shape for name in parameter.names}
        stacked = (len(parameter.names),) if parameter.stacked else ()
        assert {tuple(buffers[target].shape)} == {stacked + shape for shape in shapes}
        read_by = [node for node in program.graph.graph.find_nodes(op="get_attr") if node.target == target]
        assert len(read_by) == 1


def test_stacked_parameters_name_their_experts_in_order(program: Program) -> None:
    parameter = program.parameters["model.layers.1.mlp.experts.up_proj.weight"]
    assert parameter.names == tuple(f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(8))
    assert (parameter.module, parameter.kind) == ("model.layers.1.mlp.experts.up_proj", Kind.ROUTED_EXPERT)


def test_the_prediction_layer_is_not_in_the_graph(tiny: Callable[..., Checkpoint]) -> None:
    checkpoint = tiny(num_nextn_predict_layers=1)
    program = trace(meta_model(checkpoint), checkpoint)
    left = set(checkpoint.tensors) - {name for parameter in program.parameters.values() for name in parameter.names}
    assert left == {name for name in checkpoint.tensors if name.startswith("model.layers.2.")}


# running it


@pytest.mark.parametrize(("batch", "sequence", "past"), [(1, 1, 0), (3, 7, 0), (1, 1, 9), (2, 1, 1), (4, 6, 2)])
def test_graph_computes_the_model_at_sizes_not_traced(
    checkpoint: Checkpoint, program: Program, batch: int, sequence: int, past: int
) -> None:
    model = load_model(checkpoint)
    ids = random_ids(model, batch, past + sequence)
    latents = model(*inputs(model, ids[:, :past]))[1] if past else None
    arguments = inputs(model, ids[:, past:], latents)
    # the same operators on the same values: not even a rounding may differ
    assert equal(run(program, checkpoint, arguments), flat(model(*arguments)))


def test_graph_runs_with_padding(checkpoint: Checkpoint, program: Program) -> None:
    model = load_model(checkpoint)
    ids, mask, positions, past = inputs(model, random_ids(model, 2, 6))
    mask[1, :4] = 0
    arguments = ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), past
    assert equal(run(program, checkpoint, arguments), flat(model(*arguments)))
