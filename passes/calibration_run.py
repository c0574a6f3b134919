"""One run of the float graph over calibration text, and all that is seen on the way."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.batches import Batch, count_experts, real_tokens
from fxquant.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.execute import execute, prefill_inputs
from fxquant.passes.observe import Extremes, Observer
from fxquant.passes.smooth import Smoother
from fxquant.passes.solve import Solver
from fxquant.policy import UnseenExperts
from fxquant.program import Program
from fxquant.progress import Reporter
from fxquant.solved import SolvedCodes
from fxquant.weights import RoundedReader


class CalibrationRun:
    """Smooths `program.pairs` as their values come, and observes inputs of linears. Padding counts in nothing.

    ranges   node → what the observer keeps of its values
    experts  module that routes → int64 [E]: tokens that went to each expert
    """

    def __init__(
        self, program: Program, source: Checkpoint, batches: Sequence[Batch], observer: Observer, rounded: bool
    ) -> None:
        self.smoother = Smoother(program, source, self._rows)
        self.ranges: dict[fx.Node, Extremes] = {}
        self.experts: dict[str, Tensor] = {}
        self._program, self._batches, self._observer, self._rounded = program, batches, observer, rounded
        self._solver: Solver | None = None

    def solve(self, solved: SolvedCodes, key: str, unseen: UnseenExperts) -> None:
        """Have the run find the codes of GPTQ too, under this key."""
        self._solver = Solver(self._program, self.smoother.checkpoint, solved, key, self._rows, unseen)

    def observe(self, wanted: Collection[fx.Node], report: Reporter) -> None:
        """Run, and see the range of each of `wanted`. Raises FxquantError for NaN and infinity."""
        program, read = self._program, self.smoother.checkpoint.read

        def see(node: fx.Node, values: list[Any], live: Mapping[fx.Node, list[Any]]) -> None:
            self.smoother.observe(node, values)
            if self._solver is not None:
                self._solver.observe(node, live)
            if node in wanted:
                self.ranges[node] = self._observer(self._real(values))
                if not torch.isfinite(torch.stack([*self.ranges[node][0], *self.ranges[node][1]])).all():
                    fact = "calibration gave NaN or infinity."
                    raise FxquantError(node.name, fact, "Check the checkpoint's weights.")
            elif node.target == ops.moe_gate:
                count_experts(self.experts, node, values, self._batches)

        inputs = [prefill_inputs(program, batch.ids, mask=batch.mask) for batch in self._batches]
        with report("calibrate", len(program.graph.graph.nodes), "nodes") as advance:
            execute(program, RoundedReader(program, read) if self._rounded else read, inputs, see, advance)

    def extremes(self, nodes: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        """Of a linear that is called on each of `nodes`: the lower of their lows, the higher of their highs."""
        lows = [torch.stack(values).min() for values in zip(*(self.ranges[node][0] for node in nodes), strict=True)]
        highs = [torch.stack(values).max() for values in zip(*(self.ranges[node][1] for node in nodes), strict=True)]
        return torch.stack(lows), torch.stack(highs)

    def _real(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [real_tokens(value, batch.mask) for value, batch in zip(values, self._batches, strict=True)]

    def _rows(self, values: Sequence[Tensor]) -> Tensor:
        """[tokens, k] of all batches."""
        return torch.cat([value.flatten(0, -2) for value in self._real(values)])
