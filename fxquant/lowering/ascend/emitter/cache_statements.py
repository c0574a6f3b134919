"""Statements of the operators on a paged cache."""

from typing import Any

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.calls import Call, Emitter
from fxquant.lowering.ascend.emitter.segment_text import Writer


def _write_latents(writer: Writer, node: fx.Node, cache: fx.Node, latents: fx.Node, slot_mapping: fx.Node) -> Call:
    return writer.call("write_latents", writer.value(cache), writer.floating(latents), writer.value(slot_mapping))


def _gather_latents(writer: Writer, node: fx.Node, cache: fx.Node, block_table: fx.Node) -> Call:
    return writer.call("gather_latents", writer.value(cache), writer.value(block_table))


def _latent_attention(writer: Writer, node: fx.Node, **given: Any) -> Call:
    operand_texts = [writer.floating(given[name]) for name in ("q", "kv_b_weight")]
    operand_texts += [writer.value(given[name]) for name in ("cache", "block_table", "seq_lens")]
    operand_texts += [repr(given[name]) for name in ("num_heads", "v_head_dim", "softmax_scale")]
    return writer.call("latent_attention", *operand_texts)


CACHE_EMITTERS: dict[object, Emitter] = {
    ops.write_latents: _write_latents,
    ops.gather_latents: _gather_latents,
    ops.latent_attention: _latent_attention,
}
