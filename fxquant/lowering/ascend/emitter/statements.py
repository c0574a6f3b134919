"""Statements: operator of the graph → source of its statement.

An integer product and its dequantization are one engine operator: the product alone has no statement.
"""

from collections.abc import Sequence
from typing import Any

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.calls import NPU, Call, Emitter, Fused
from fxquant.lowering.ascend.emitter.aten import aten_call
from fxquant.lowering.ascend.emitter.cache_statements import CACHE_EMITTERS
from fxquant.lowering.ascend.emitter.fused_statements import FUSED_EMITTERS
from fxquant.lowering.ascend.emitter.segment_text import CHANGED, Writer
from fxquant.lowering.ascend.emitter.structure import is_attention_mask
from fxquant.lowering.ascend.emitter.values import is_int32
from fxquant.lowering.ascend.operators import LINEARS
from fxquant.lowering.ascend.operators.grouped_matmul import grouped_matmul
from fxquant.program.linears import PROJECTIONS
from fxquant.program.operands import arguments

PRODUCTS = {product for _, product in LINEARS}


def right_hand_side(writer: Writer, node: fx.Node) -> Call | str | None:
    """Source for one call; None if the statement of another call includes it."""
    if node.target in PRODUCTS:
        _expect_fusible(writer, node)
        return None
    fused = _fused(node)
    emitter = EMITTERS.get(node.target) if fused is None else fused.statement
    if emitter is not None:
        return emitter(writer, node, **arguments(node))
    if node.target in ops.REFERENCES:
        raise writer.fail(node, f"{node.target} has no Ascend statement.", CHANGED)
    return aten_call(writer, node)


def _fused(node: fx.Node) -> Fused | None:
    """The statement that the call shares with the one that makes its operand, if any."""
    entries = (LINEARS.get((node.target, argument.target)) for argument in node.all_input_nodes)
    return next((entry for entry in entries if entry is not None), None)


def _expect_fusible(writer: Writer, node: fx.Node) -> None:
    for user in node.users:
        entry = LINEARS.get((user.target, node.target))
        read = [] if entry is None else [name for name, value in arguments(user).items() if value is node]
        if entry is None or read != [entry.operand] or user not in writer.segment.calls:
            fact = f"its integers are read by {user.name}, but engines return them only dequantized."
            raise writer.fail(node, fact, CHANGED)


def _rows(writer: Writer, node: fx.Node) -> str:
    return f"{writer.floating(node)}.flatten(0, -2)"


def _embedding(writer: Writer, node: fx.Node, weight: fx.Node, ids: fx.Node) -> Call:
    return Call("F.embedding", (writer.graph_layout(ids), writer.value(weight)))


def _linear(writer: Writer, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Call:
    return Call("F.linear", tuple(writer.floating(arg) for arg in (x, weight, bias) if arg is not None))


def _rms_norm(writer: Writer, node: fx.Node, x: fx.Node, weight: fx.Node, eps: float, bias: fx.Node | None) -> Call:
    tail = "[0]" if bias is None else f"[0] + {writer.value(bias, 'float32')}"
    norm = Call(f"{NPU}npu_rms_norm", (writer.floating(x), writer.floating(weight), repr(eps)), tail)
    return norm if tail == "[0]" else Call(f"({norm.head}", norm.arguments, f"{tail}).to(dtype)")


def _swiglu(writer: Writer, node: fx.Node, gate: fx.Node, up: fx.Node) -> Call:
    return Call(f"{NPU}npu_swiglu", (f"torch.cat(({writer.floating(gate)}, {writer.floating(up)}), -1)",))


def _rope_table(writer: Writer, node: fx.Node, position_ids: fx.Node, inv_freq: Sequence[float], scale: float) -> Call:
    return writer.call("rope_table", writer.graph_layout(position_ids), repr(list(inv_freq)), repr(scale), "dtype")


def _rope(writer: Writer, node: fx.Node, x: fx.Node, cos: fx.Node, sin: fx.Node, num_heads: int) -> Call:
    return writer.call("rope", *(writer.floating(arg) for arg in (x, cos, sin)), repr(num_heads))


def _mla_attention(writer: Writer, node: fx.Node, attention_mask: fx.Node, **given: Any) -> Call:
    operand_texts = [writer.floating(given[name]) for name in ("q", "kv", "k_rope")]
    numbers = (repr(given[name]) for name in ("num_heads", "v_head_dim", "softmax_scale"))
    hidden = "hidden_keys"
    if not is_attention_mask(writer.program, attention_mask, node):
        writer.used.add("find_hidden_keys")
        hidden = f"find_hidden_keys({writer.graph_layout(attention_mask)}, {operand_texts[0]}.shape[1])"
    return writer.call("mla_attention", *operand_texts, hidden, *numbers)


def _quantize_static(writer: Writer, node: fx.Node, x: fx.Node, input_scale: fx.Node, input_offset: fx.Node) -> Call:
    parameters = writer.value(input_scale, "quantizer_scale"), writer.value(input_offset, "quantizer_offset")
    # the last two are axis and div_mode: divide, as the graph does, instead of multiplying by a reciprocal
    return Call(f"{NPU}npu_quantize", (writer.floating(x), *parameters, "torch.qint8", "-1", "True"))


def _quantize_per_token(writer: Writer, node: fx.Node, x: fx.Node) -> Call:
    return Call(f"{NPU}npu_dynamic_quant", (writer.floating(x),))


def _router_logits(writer: Writer, node: fx.Node, x: fx.Node, weight: fx.Node) -> Call:
    # float32 whatever the model's dtype: rounded logits could choose other experts
    return Call("F.linear", (f"{writer.value(x)}.float()", f"{writer.value(weight, 'float32')}"))


def _moe_gate(writer: Writer, node: fx.Node, logits: fx.Node, correction_bias: fx.Node, **given: Any) -> Call:
    numbers = (repr(given[name]) for name in ("top_k", "n_group", "topk_group", "routed_scaling_factor"))
    function = "moe_gate" if given["norm_topk_prob"] else "moe_gate_unnormalized"
    return writer.call(function, writer.value(logits), writer.value(correction_bias, "float32"), *numbers)


def _moe_init_routing(writer: Writer, node: fx.Node, x: fx.Node, ids: fx.Node, num_experts: int) -> Call:
    expert_ids = writer.value(ids)
    return Call(
        f"{NPU}npu_moe_init_routing_v2",
        (
            _rows(writer, x),
            f"{expert_ids if is_int32(ids) else f'{expert_ids}.int()'}.flatten(0, -2)",
            "active_num=0",  # all rows (op-plugin documentation); an exported graph would fix their number
            f"expert_num={num_experts}",
            "expert_tokens_num_type=1",
            "expert_tokens_num_flag=True",
            "quant_mode=-1",
            f"active_expert_range=[0, {num_experts}]",
            "row_idx_type=0",
        ),
        "[:3]",
    )


def _moe_finalize_routing(writer: Writer, node: fx.Node, rows: fx.Node, row_index: fx.Node, weights: fx.Node) -> Call:
    return _unpermute(writer, writer.floating(rows), writer.value(row_index), weights)


def _unpermute(writer: Writer, rows: str, row_index: str, weights: fx.Node) -> Call:
    expert_weights, probabilities = writer.value(weights), writer.floating(weights)
    operand_texts = (rows, row_index, f"{probabilities}.flatten(0, -2)")
    return Call(f"{NPU}npu_moe_token_unpermute", operand_texts, f".unflatten(0, {expert_weights}.shape[:-1])")


def _moe_experts(writer: Writer, node: fx.Node, x: fx.Node, ids: fx.Node, weights: fx.Node, **given: fx.Node) -> Call:
    """Float experts: the same operators around them as for quantized experts."""
    gate, up, down = (writer.value(given[name], "floating_transposed") for name in PROJECTIONS)
    parts = ("rows", "row_index", "counts", "gate_proj", "up_proj", "swiglu", "down_proj")
    names = {part: writer.names.local(f"{writer.value(node)}_{part}") for part in parts}
    experts = len(writer.program.parameters[str(given["gate_proj"].target)].names)
    target = ", ".join(names[part] for part in parts[:3])
    writer.assign(target, _moe_init_routing(writer, node, x, ids, experts))
    writer.assign(names["gate_proj"], grouped_matmul(names["rows"], [f"[{gate}]"], names["counts"]))
    writer.assign(names["up_proj"], grouped_matmul(names["rows"], [f"[{up}]"], names["counts"]))
    halves = f"torch.cat(({names['gate_proj']}, {names['up_proj']}), -1)"
    writer.assign(names["swiglu"], Call(f"{NPU}npu_swiglu", (halves,)))
    writer.assign(names["down_proj"], grouped_matmul(names["swiglu"], [f"[{down}]"], names["counts"]))
    return _unpermute(writer, names["down_proj"], names["row_index"], weights)


EMITTERS: dict[object, Emitter] = {
    **FUSED_EMITTERS,
    **CACHE_EMITTERS,
    ops.embedding: _embedding,
    ops.linear: _linear,
    ops.rms_norm: _rms_norm,
    ops.swiglu: _swiglu,
    ops.rope_table: _rope_table,
    ops.rope: _rope,
    ops.mla_attention: _mla_attention,
    ops.router_logits: _router_logits,
    ops.moe_gate: _moe_gate,
    ops.moe_init_routing: _moe_init_routing,
    ops.moe_finalize_routing: _moe_finalize_routing,
    ops.moe_experts: _moe_experts,
    ops.quantize_static: _quantize_static,
    ops.quantize_per_token: _quantize_per_token,
}
