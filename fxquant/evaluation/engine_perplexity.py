"""Engine perplexity: the graph run with an engine's arithmetic; a reader of the weight files computes each linear."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.engine_readers import Arithmetic, EngineReader
from fxquant.evaluation.divergence import CHUNK
from fxquant.program.program import Program
from fxquant.progress import Advance, Reporter, silent
from fxquant.runtime.execute import Values, execute, prefill_inputs
from fxquant.runtime.weight_providers import Read
from fxquant.verification.engine_check import Site, sites


class Replacement:
    """Observes an execution, and replaces the graph's results by the reader's at every dequantize node."""

    def __init__(self, program: Program, reader: EngineReader, arithmetic: Arithmetic) -> None:
        self._reader, self._arithmetic = reader, arithmetic
        self._sites = {site.node: site for site in sites(program)}
        self._last_use = {node: site.node for site in self._sites.values() for node in _inputs(site)}
        self._live: dict[fx.Node, list[Any]] = {}

    def __call__(self, node: fx.Node, values: list[Any], inputs: Values) -> None:
        """`values` of the batches are replaced in place; inputs of later sites are kept until their last use."""
        if node in self._sites:
            values[:] = self._results(self._sites[node], values)
            for dead in [argument for argument, last in self._last_use.items() if last is node]:
                self._live.pop(dead, None)
        if node in self._last_use:
            self._live[node] = list(values)

    def _results(self, site: Site, graph: list[Tensor]) -> list[Tensor]:
        """float32 of each batch. An expert is loaded once for all batches, and not at all if it has no rows."""
        inputs = self._live[site.x]
        results = [torch.empty_like(value, dtype=torch.float32) for value in graph]
        counts = [None] * len(graph) if site.counts is None else self._live[site.counts]
        rows = [site.rows(count) for count in counts]
        for expert in range(len(site.recipe.modules)):
            routed = [batch for batch in range(len(graph)) if expert in rows[batch]]
            loaded = site.load(self._reader, expert) if routed else None
            for batch in routed:
                place = rows[batch][expert]
                assert loaded is not None
                results[batch][place] = loaded(inputs[batch][place], self._arithmetic)
        return results


def _inputs(site: Site) -> tuple[fx.Node, ...]:
    return (site.x,) if site.counts is None else (site.x, site.counts)


def run_through_reader(
    program: Program,
    reader: EngineReader,
    read: Read,
    batches: Sequence[Sequence[Tensor]],
    arithmetic: Arithmetic,
    advance: Advance | None = None,
) -> list:
    """Outputs of each batch of flat inputs, as from `execute`, with quantized linears computed by the reader.

    Everything else is the graph's float32 on the tensors of `read`.
    """
    return execute(program, read, batches, Replacement(program, reader, arithmetic), advance)


def reader_perplexity(
    program: Program,
    reader: EngineReader,
    read: Read,
    batches: list[Tensor],
    arithmetic: Arithmetic,
    report: Reporter = silent,
) -> float:
    """exp of the mean -log p of every next token of `batches`, int64 [1, length].

    Scored as in `fxquant.evaluation.divergence`.
    """
    total, tokens = 0.0, 0
    with report("evaluate through reader", len(batches), "batches") as advance:
        for start in range(0, len(batches), CHUNK):
            chunk = batches[start : start + CHUNK]
            inputs = [prefill_inputs(program, ids) for ids in chunk]
            outputs = run_through_reader(program, reader, read, inputs, arithmetic)
            for ids, output in zip(chunk, outputs, strict=True):
                scored = output[0][:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])
                total -= float(scored.sum())
                tokens += scored.numel()
            advance(len(chunk))
    return math.exp(total / tokens)
