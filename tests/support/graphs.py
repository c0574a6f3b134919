"""Graphs as text, and running them with a checkpoint's weights."""

from typing import Any

import torch
from tiny import inputs, load_graph, load_model, meta_model, random_ids
from torch import Tensor, fx

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.models import DecoderLayer
from fxquant.program.node_names import operator_name
from fxquant.program.program import Program
from fxquant.tracing import trace

DENSE_LAYER = """
input_layernorm = rms_norm(embed_tokens, input_layernorm_weight, 1e-06)
self_attn_q_a_proj = linear(input_layernorm, self_attn_q_a_proj_weight)
self_attn_q_a_layernorm = rms_norm(self_attn_q_a_proj, self_attn_q_a_layernorm_weight, 1e-06)
self_attn_q_b_proj = linear(self_attn_q_a_layernorm, self_attn_q_b_proj_weight)
self_attn_rope = rope(self_attn_q_b_proj, rope_table_0, rope_table_1, 4)
self_attn_kv_a_proj_with_mqa = linear(input_layernorm, self_attn_kv_a_proj_with_mqa_weight)
self_attn_split_with_sizes = split_with_sizes(self_attn_kv_a_proj_with_mqa, [32, 8], -1)
self_attn_split_with_sizes_0 = getitem(self_attn_split_with_sizes, 0)
self_attn_split_with_sizes_1 = getitem(self_attn_split_with_sizes, 1)
self_attn_kv_a_layernorm = rms_norm(self_attn_split_with_sizes_0, self_attn_kv_a_layernorm_weight, 1e-06)
self_attn_rope_1 = rope(self_attn_split_with_sizes_1, rope_table_0, rope_table_1, 1)
self_attn_cat = cat([self_attn_kv_a_layernorm, self_attn_rope_1], -1)
self_attn_cat_1 = cat([past_0, self_attn_cat], 1)
self_attn_split_with_sizes_2 = split_with_sizes(self_attn_cat_1, [32, 8], -1)
self_attn_split_with_sizes_2_0 = getitem(self_attn_split_with_sizes_2, 0)
self_attn_split_with_sizes_2_1 = getitem(self_attn_split_with_sizes_2, 1)
self_attn_kv_b_proj = linear(self_attn_split_with_sizes_2_0, self_attn_kv_b_proj_weight)
self_attn_mla_attention = mla_attention(self_attn_rope, self_attn_kv_b_proj, self_attn_split_with_sizes_2_1, attention_mask, 4, 16, 0.2041241452319315)
self_attn_o_proj = linear(self_attn_mla_attention, self_attn_o_proj_weight)
add = add(embed_tokens, self_attn_o_proj)
post_attention_layernorm = rms_norm(add, post_attention_layernorm_weight, 1e-06)
mlp_gate_proj = linear(post_attention_layernorm, mlp_gate_proj_weight)
mlp_up_proj = linear(post_attention_layernorm, mlp_up_proj_weight)
mlp_swiglu = swiglu(mlp_gate_proj, mlp_up_proj)
mlp_down_proj = linear(mlp_swiglu, mlp_down_proj_weight)
add_1 = add(add, mlp_down_proj)
"""  # noqa: E501
"""The calls of layer 0 of the tiny model."""


def text(program: Program, block: str) -> str:
    """The calls of a block, one a line, names without the block's own."""
    nodes = [node for node in program.graph.graph.nodes if node.op == "call_function" and node.meta["block"] == block]
    lines = (f"{node.name} = {operator_name(node)}({', '.join(map(str, node.args))})" for node in nodes)
    return "\n" + "\n".join(lines).replace(block.removeprefix("model.").replace(".", "_") + "_", "") + "\n"


def run(program: Program, checkpoint: Checkpoint, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The graph's outputs with the checkpoint's weights, node by node."""
    *tensors, past = arguments
    return list(fx.Interpreter(load_graph(program, checkpoint)).run(*tensors, *past))


def flat(outputs: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    """A model's outputs as a graph gives them."""
    return [outputs[0], *outputs[1]]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def traced(checkpoint: Checkpoint, layer: type[DecoderLayer]) -> Program:
    return trace(meta_model(checkpoint, layer), checkpoint)


def computes_the_same(checkpoint: Checkpoint, layer: type[DecoderLayer]) -> bool:
    """The traced graph of a model of such layers gives bit for bit what its forward gives."""
    model = load_model(checkpoint, layer=layer)
    arguments = inputs(model, random_ids(model, 3, 4))
    return equal(run(traced(checkpoint, layer), checkpoint, arguments), flat(model(*arguments)))
