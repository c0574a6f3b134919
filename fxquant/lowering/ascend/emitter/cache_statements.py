"""Statements of the operators on a cache in pages."""

from torch import fx

from fxquant import ops
from fxquant.lowering.ascend.emitter.segment_text import Call, Emitter, Writer
from fxquant.program.operands import operands


def _write_latents(writer: Writer, node: fx.Node) -> Call:
    cache, latents, slot_mapping = operands(node)
    return writer.call("write_latents", writer.value(cache), writer.floating(latents), writer.value(slot_mapping))


def _gather_latents(writer: Writer, node: fx.Node) -> Call:
    return writer.call("gather_latents", *(writer.value(arg) for arg in operands(node)))


def _latent_attention(writer: Writer, node: fx.Node) -> Call:
    q, weight, cache, block_table, seq_lens, *numbers = operands(node)
    sources = [writer.floating(q), writer.floating(weight)]
    sources += [writer.value(arg) for arg in (cache, block_table, seq_lens)]
    return writer.call("latent_attention", *sources, *(repr(number) for number in numbers))


CACHE_EMITTERS: dict[object, Emitter] = {
    ops.write_latents: _write_latents,
    ops.gather_latents: _gather_latents,
    ops.latent_attention: _latent_attention,
}
