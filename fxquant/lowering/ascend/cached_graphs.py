"""Cached graphs, which run over a paged cache: prefill, and decoding with absorbed latents."""

from collections.abc import Mapping
from dataclasses import dataclass

from fxquant import ops
from fxquant.lowering.ascend.emitter.functions import Emitted, Functions, Weights
from fxquant.passes.base import Pass, PassResult, run_passes
from fxquant.passes.npu.page_latents import caches
from fxquant.passes.pipeline import npu_decode, npu_prefill
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program, parse_program


@dataclass(frozen=True)
class Cached:
    """One of the two graphs with its functions, and the results of its passes."""

    program: Program
    emitted: list[Emitted]
    results: tuple[PassResult, ...]


def cached_graphs(program: Program, emitted: list[Emitted]) -> tuple[Cached, Cached]:
    """The graphs of prefill and of decoding, which share functions with `program` if these read alike."""
    functions = Functions(emitted)
    weights = {call.segment.key: call.function.weights for call in emitted}
    prefill = prefill_graph(program, functions, weights)
    # decode's tables extend those of prefill: a block has one table for all graphs
    weights |= {call.segment.key: call.function.weights for call in prefill.emitted}
    return prefill, decode_graph(program, functions, weights)


def prefill_graph(program: Program, functions: Functions, weights: Mapping[str, Weights]) -> Cached:
    """Attention as in `program`, over latents gathered from the pages plus the new ones; W8A8_MIX per token."""
    return _cached(program, npu_prefill(), functions, weights, "_prefill")


def decode_graph(program: Program, functions: Functions, weights: Mapping[str, Weights]) -> Cached:
    """Attention directly over the pages if kv_b_proj can be absorbed, else as in prefill."""
    return _cached(program, npu_decode(), functions, weights, "_decode")


def _cached(
    program: Program, passes: list[Pass], functions: Functions, weights: Mapping[str, Weights], suffix: str
) -> Cached:
    # a copy, as passes rewrite in place
    copy = parse_program(dump_program(program), f"the{suffix.replace('_', ' ')} graph")
    results = tuple(run_passes(copy, passes))
    return Cached(copy, functions.of(copy, suffix, weights), results)


def latent_parts(program: Program) -> list[tuple[int, int]]:
    """For each cache of a decode graph: features of c_kv and of k_rope.

    A cache that no `latent_attention` reads is split anywhere: its two parts are concatenated again before use.
    """
    ranks = {}
    for node in program.nodes(ops.latent_attention):
        weight, written = operand_node(node, "kv_b_weight"), operand_node(node, "cache")
        ranks[operand(written, "cache")] = int(weight.meta["val"].shape[1])
    widths = {cache: int(cache.meta["val"].shape[-1]) for cache in caches(program)}
    return [(ranks.get(cache, width // 2), width - ranks.get(cache, width // 2)) for cache, width in widths.items()]
