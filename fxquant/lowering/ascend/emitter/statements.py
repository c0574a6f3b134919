"""Operator of the graph → source of its statement.

An integer product and its dequantization are one engine operator: the product alone has no statement.
"""

from torch import fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.emitter.aten import aten_call
from fxquant.lowering.ascend.emitter.cache_statements import CACHE_EMITTERS
from fxquant.lowering.ascend.emitter.fused_statements import FUSED_EMITTERS
from fxquant.lowering.ascend.emitter.segment_text import CHANGED, NPU, Call, Emitter, Writer
from fxquant.lowering.ascend.emitter.structure import is_attention_mask
from fxquant.lowering.ascend.emitter.values import is_int32
from fxquant.program.operands import operands
from fxquant.schemes.schemes import Recipe

PRODUCTS = {
    ops.int_matmul: (ops.dequantize_static, ops.dequantize_per_token),
    ops.int4_matmul: (ops.dequantize_per_token,),
    ops.grouped_int_matmul: (ops.grouped_dequantize,),
    ops.grouped_int4_matmul: (ops.grouped_dequantize,),
}
"""Integer products → the calls that an engine operator does together with them."""

WORD = 8
"""Int4 output channels in one int32 of a grouped matmul's weight."""


def right_hand_side(writer: Writer, node: fx.Node) -> Call | str | None:
    """Source for one call; None when another statement does its work."""
    if node.target in PRODUCTS:
        _expect_fusible(writer, node)
        return None
    emitter = EMITTERS.get(node.target)
    if emitter is None and node.target in ops.REFERENCES:
        raise writer.fail(node, f"{node.target} has no Ascend statement.", CHANGED)
    return (emitter or aten_call)(writer, node)


def _expect_fusible(writer: Writer, node: fx.Node) -> None:
    fusible = PRODUCTS[node.target]  # type: ignore[index]
    for user in node.users:
        if user.target not in fusible or operands(user)[0] is not node or user not in writer.segment.calls:
            fact = f"its integers are read by {user.name}, engines only give them dequantized."
            raise writer.fail(node, fact, CHANGED)


def _rows(writer: Writer, node: fx.Node) -> str:
    return f"{writer.floating(node)}.flatten(0, -2)"


def _embedding(writer: Writer, node: fx.Node) -> Call:
    weight, ids = operands(node)
    return Call("F.embedding", (writer.graph_layout(ids), writer.value(weight)))


def _linear(writer: Writer, node: fx.Node) -> Call:
    return Call("F.linear", tuple(writer.floating(arg) for arg in operands(node) if arg is not None))


def _rms_norm(writer: Writer, node: fx.Node) -> Call:
    x, weight, eps, *bias = operands(node)
    tail = f"[0] + {writer.value(bias[0], 'float32')}" if bias and bias[0] is not None else "[0]"
    norm = Call(f"{NPU}npu_rms_norm", (writer.floating(x), writer.floating(weight), repr(eps)), tail)
    return norm if tail == "[0]" else Call(f"({norm.head}", norm.arguments, f"{tail}).to(dtype)")


def _swiglu(writer: Writer, node: fx.Node) -> Call:
    gate, up = (writer.floating(arg) for arg in operands(node))
    return Call(f"{NPU}npu_swiglu", (f"torch.cat(({gate}, {up}), -1)",))


def _rope_table(writer: Writer, node: fx.Node) -> Call:
    position_ids, inv_freq, scale = operands(node)
    return writer.call("rope_table", writer.graph_layout(position_ids), repr(list(inv_freq)), repr(scale), "dtype")


def _rope(writer: Writer, node: fx.Node) -> Call:
    return writer.call("rope", *(writer.floating(arg) for arg in operands(node)[:3]), repr(operands(node)[3]))


def _mla_attention(writer: Writer, node: fx.Node) -> Call:
    q, kv, k_rope, mask, *numbers = operands(node)
    sources = [writer.floating(arg) for arg in (q, kv, k_rope)]
    hidden = "hidden_keys"
    if not is_attention_mask(writer.program, mask, node):
        writer.used.add("find_hidden_keys")
        hidden = f"find_hidden_keys({writer.graph_layout(mask)}, {sources[0]}.shape[1])"
    return writer.call("mla_attention", *sources, hidden, *(repr(number) for number in numbers))


def _quantize_static(writer: Writer, node: fx.Node) -> Call:
    x, scale, offset = operands(node)
    parameters = writer.value(scale, "quantizer_scale"), writer.value(offset, "quantizer_offset")
    return Call(f"{NPU}npu_quantize", (writer.floating(x), *parameters, "torch.qint8", "-1", "True"))


def _quantize_per_token(writer: Writer, node: fx.Node) -> Call:
    return Call(f"{NPU}npu_dynamic_quant", (writer.floating(operands(node)[0]),))


def _dequantize_static(writer: Writer, node: fx.Node) -> Call:
    product, deq_scale, quant_bias = operands(node)
    x8, weight = operands(product)
    sources = writer.value(x8), writer.value(weight, "int8_transposed"), writer.value(deq_scale, "as_stored")
    bias = f"bias={writer.value(quant_bias, 'as_stored')}"
    return Call(f"{NPU}npu_quant_matmul", (*sources, bias, "output_dtype=dtype"))


def _dequantize_per_token(writer: Writer, node: fx.Node) -> Call:
    """The per-token scale is one number a row, so leading dimensions are flattened around the operator."""
    product, x_scale, weight_scale, *bias = operands(node)
    if product.target == ops.int4_matmul:
        return _int4_linear(writer, node)
    x8 = writer.value(operands(product)[0])
    weight, scale = writer.value(operands(product)[1], "int8_transposed"), writer.value(weight_scale, "channel_scale")
    sources = [f"{x8}.flatten(0, -2)", weight, scale, f"pertoken_scale={writer.value(x_scale)}.flatten()"]
    if bias and bias[0] is not None:
        sources.append(f"bias={writer.value(bias[0])}")
    sources.append("output_dtype=dtype")
    return Call(f"{NPU}npu_quant_matmul", tuple(sources), f".unflatten(0, {x8}.shape[:-1])")


def _int4_linear(writer: Writer, node: fx.Node) -> Call:
    product, x_scale, _, *bias = operands(node)
    x8, weight = operands(product)[:2]
    recipe = writer.recipe(weight)
    sources = writer.value(x8), writer.value(x_scale), *_int4_operands(writer, recipe)
    call = writer.call("int4_linear", *sources, "dtype")
    return Call(call.head, call.arguments, f" + {writer.value(bias[0])}") if bias and bias[0] is not None else call


def _int4_operands(writer: Writer, recipe: Recipe) -> tuple[str, str, str]:
    """Weight, combined scale and scale_bias."""
    n = recipe.out_features
    if n % WORD:
        fact = f"out_features {n} is not a multiple of {WORD}: npu_grouped_matmul reads {WORD} int4 channels a word."
        raise FxquantError(f"layer {recipe.module}", fact, "Use W8A8_DYNAMIC for it, or another target.")
    packed = recipe.weight_format.packed
    scales = ("weight_scale", "weight_scale_second") if recipe.group_size else ("weight_scale",)
    weight = writer.made(recipe, "weight", "int4_words" if packed else "int4_words_unpacked", ("weight",))
    scale = writer.made(recipe, "scale", "group_scale" if recipe.group_size else "channel_scale_word", scales)
    if packed:
        return weight, scale, writer.made(recipe, "scale_bias", "summed", ("scale_bias",))
    layout = "group_scale_bias" if recipe.group_size else "channel_scale_bias"
    return weight, scale, writer.made(recipe, "scale_bias", layout, ("weight", *scales))


def _grouped_dequantize(writer: Writer, node: fx.Node) -> Call:
    product, x_scale, weight_scale, counts = operands(node)
    x8, weight = operands(product)[:2]
    if product.target == ops.grouped_int4_matmul:
        words, scale, bias = _int4_operands(writer, writer.recipe(weight))
        sources = [f"[{words}]", f"bias=[{bias}]"]
    else:
        sources = [f"[{writer.value(weight, 'int8_transposed')}]"]
        scale = writer.value(weight_scale, "expert_scale")
    sources += [f"scale=[{scale}]", f"per_token_scale=[{writer.value(x_scale)}]"]
    return _grouped_matmul(writer.value(x8), sources, writer.value(counts), ("output_dtype=dtype",))


def _grouped_matmul(x: str, sources: list[str], counts: str, rest: tuple[str, ...] = ()) -> Call:
    groups = (f"group_list={counts}", "split_item=2", "group_type=0", "group_list_type=1")
    return Call(f"{NPU}npu_grouped_matmul", (f"[{x}]", *sources, *groups, *rest), "[0]")


def _router_logits(writer: Writer, node: fx.Node) -> Call:
    x, weight = operands(node)
    return Call("F.linear", (f"{writer.value(x)}.float()", f"{writer.value(weight, 'float32')}"))


def _moe_gate(writer: Writer, node: fx.Node) -> Call:
    logits, bias, top_k, n_group, topk_group, normalized, factor = operands(node)
    numbers = (repr(number) for number in (top_k, n_group, topk_group, factor))
    function = "moe_gate" if normalized else "moe_gate_unnormalized"
    return writer.call(function, writer.value(logits), writer.value(bias, "float32"), *numbers)


def _moe_init_routing(writer: Writer, node: fx.Node) -> Call:
    return _init_routing(writer, *operands(node))


def _init_routing(writer: Writer, x: fx.Node, ids: fx.Node, experts: int) -> Call:
    chosen = writer.value(ids)
    return Call(
        f"{NPU}npu_moe_init_routing_v2",
        (
            _rows(writer, x),
            f"{chosen if is_int32(ids) else f'{chosen}.int()'}.flatten(0, -2)",
            "active_num=0",  # all rows (op-plugin documentation); an exported graph would fix their number
            f"expert_num={experts}",
            "expert_tokens_num_type=1",
            "expert_tokens_num_flag=True",
            "quant_mode=-1",
            f"active_expert_range=[0, {experts}]",
            "row_idx_type=0",
        ),
        "[:3]",
    )


def _moe_finalize_routing(writer: Writer, node: fx.Node) -> Call:
    rows, row_index, weights = operands(node)
    return _unpermute(writer, writer.floating(rows), writer.value(row_index), weights)


def _unpermute(writer: Writer, rows: str, row_index: str, weights: fx.Node) -> Call:
    chosen, probabilities = writer.value(weights), writer.floating(weights)
    sources = (rows, row_index, f"{probabilities}.flatten(0, -2)")
    return Call(f"{NPU}npu_moe_token_unpermute", sources, f".unflatten(0, {chosen}.shape[:-1])")


def _moe_experts(writer: Writer, node: fx.Node) -> Call:
    """Float experts: the same route as quantized ones."""
    x, ids, weights, *projections = operands(node)
    gate, up, down = (writer.value(weight, "floating_transposed") for weight in projections)
    parts = ("rows", "row_index", "counts", "gate_proj", "up_proj", "swiglu", "down_proj")
    names = {part: writer.names.local(f"{writer.value(node)}_{part}") for part in parts}
    experts = len(writer.program.parameters[str(projections[0].target)].names)
    target = ", ".join(names[part] for part in parts[:3])
    writer.assign(target, _init_routing(writer, x, ids, experts))
    writer.assign(names["gate_proj"], _grouped_matmul(names["rows"], [f"[{gate}]"], names["counts"]))
    writer.assign(names["up_proj"], _grouped_matmul(names["rows"], [f"[{up}]"], names["counts"]))
    halves = f"torch.cat(({names['gate_proj']}, {names['up_proj']}), -1)"
    writer.assign(names["swiglu"], Call(f"{NPU}npu_swiglu", (halves,)))
    writer.assign(names["down_proj"], _grouped_matmul(names["swiglu"], [f"[{down}]"], names["counts"]))
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
    ops.dequantize_static: _dequantize_static,
    ops.dequantize_per_token: _dequantize_per_token,
    ops.grouped_dequantize: _grouped_dequantize,
}
