"""Prediction layers in a calibration: what their graph reads, from the model's run and its batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn.functional import pad

from fxquant import ops
from fxquant.calibration.batches import Batch
from fxquant.errors import FxquantError
from fxquant.policy.kinds import Kind
from fxquant.program.linears import linear_sites
from fxquant.program.operands import operand_node
from fxquant.program.program import Program
from fxquant.runtime.execute import prefill_inputs


@dataclass(frozen=True)
class Prediction:
    """The multi-token prediction layers of a model, and the batches as each of them sees them.

    program  their float graph, of `fxquant.tracing.trace_predictors`, with their recipes
    source   the call of the model's graph whose value the first layer reads
    batches  layer's path → the tokens that it reads at each position; mask 0 where the document has ended by then
    """

    program: Program
    source: fx.Node
    batches: dict[str, list[Batch]]

    @property
    def hidden(self) -> fx.Node:
        """The input that takes the value of `source`."""
        return self.program.graph.graph.find_nodes(op="placeholder")[-1]

    def inputs(self, model: Program, batches: Sequence[Batch]) -> list[list[Tensor]]:
        """Flat inputs for each of the model's `batches`, without the hidden states: prefill on empty caches."""
        flat = []
        for index, batch in enumerate(batches):
            _, mask, positions, *caches = prefill_inputs(model, batch.ids, mask=batch.mask)
            later = [own[index].ids for own in self.batches.values()]
            flat.append([mask, positions, *([caches[0]] * len(later)), *later])
        return flat


def prediction(model: Program, predictors: Program, batches: Sequence[Batch]) -> Prediction:
    """What `predictors`, a program of the prediction layers `model.mtp.layers`, needs to run after `model`.

    Raises FxquantError for a batch without a token that a layer could read.
    """
    later = {path: [shifted(batch, step) for batch in batches] for step, path in enumerate(model.mtp.layers, 1)}
    for step, (path, own) in enumerate(later.items(), 1):
        for number, batch in enumerate(own, 1):
            if not batch.tokens:
                fact = f"batch {number} has no document of {step + 1} tokens: {path} would see nothing of it."
                raise FxquantError("calibration text", fact, "Leave short documents out, or use a larger --batch-size.")
    return Prediction(predictors, head_input(model), later)


def head_input(model: Program) -> fx.Node:
    """The hidden states that the model's head multiplies, [B, S, hidden]: engines draft from these."""
    heads = [site.node for site in linear_sites(model) if site.kind is Kind.HEAD and site.node.target == ops.linear]
    if len(heads) != 1:
        fact = f"its graph has {len(heads)} heads: what its prediction layers read is not known."
        raise FxquantError(", ".join(model.mtp.layers), fact, "Use W8A8_DYNAMIC or FLOAT for kind mtp.")
    return operand_node(heads[0], "x")


def shifted(batch: Batch, step: int) -> Batch:
    """The tokens `step` places later at each position; where there is none, id 0 and mask 0."""
    ids, mask = (pad(rows[:, step:], (0, min(step, rows.shape[1]))) for rows in (batch.ids, batch.mask))
    return Batch(torch.where(mask != 0, ids, 0), mask)
