"""Calibration run: the float graph over calibration text, block by block, with all observers."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.calibration.batches import Batch, count_experts, real_tokens
from fxquant.calibration.gptq import Solver, solved_modules
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.calibration.observers import Observer as RangeObserver
from fxquant.calibration.prediction import Prediction
from fxquant.calibration.resume_folder import CalibrationFolder
from fxquant.calibration.resume_state import Key, State
from fxquant.calibration.smoother import Smoother
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.errors import FxquantError
from fxquant.policy.policy import UnseenExperts
from fxquant.program.program import Program
from fxquant.progress import Reporter
from fxquant.runtime.execute import Observer, Values, prefill_inputs
from fxquant.runtime.stream import Prepare, Stream
from fxquant.runtime.weight_providers import CPU, Read, RoundedWeights
from fxquant.storage.hashing import hash_text


@dataclass(frozen=True)
class Stage:
    """One run over a graph, and who looks at it; `begin` takes what it needs from the stage before."""

    stream: Stream
    see: Observer
    prepare: Prepare | None = None
    begin: Callable[[], None] = lambda: None


class CalibrationRun:
    """Smooths `program.pairs` as their values are computed, and observes inputs of linears. Padding is excluded.

    Only nodes that these values depend on run, on `device`; all results are on the CPU. With `rounded` ranges the graph
    runs twice: on float weights for the scales of pairs, then on the smoothed and rounded ones for the ranges. After it
    the prediction layers run, on the hidden states with which the ranges were observed.

    ranges   node → lows and highs from the observer, float32 [batches] or [1] each
    experts  routing module → int64 [E]: tokens routed to each expert
    """

    def __init__(
        self,
        program: Program,
        source: Checkpoint,
        batches: Sequence[Batch],
        observer: RangeObserver,
        rounded: bool,
        device: torch.device = CPU,
    ) -> None:
        self.smoother = Smoother(program, source, self._rows)
        self.ranges: dict[fx.Node, tuple[Tensor, Tensor]] = {}
        self.experts: dict[str, Tensor] = {}
        self._program, self._batches, self._observer = program, batches, observer
        self._rounded, self._device = rounded, device
        self._solver: Solver | None = None
        self._prediction: Prediction | None = None

    def solve(self, solved: SolvedCodes, key: str, unseen: UnseenExperts) -> None:
        """Let the run compute GPTQ codes as well, stored under `key`."""
        self._solver = Solver(self._program, self.smoother.checkpoint, solved, key, self._rows, unseen)

    def predict(self, prediction: Prediction) -> None:
        """Let the run go on with the prediction layers."""
        self._prediction = prediction

    def observe(
        self,
        observed: Collection[fx.Node],
        report: Reporter,
        folder: CalibrationFolder | None = None,
        key: Key | None = None,
    ) -> None:
        """Run, and observe the range of each of `observed`, calls of the model or of its prediction layers. Raises
        FxquantError for NaN and infinity.

        After each block a state is saved to `folder`, from which a run with the same `key` resumes.
        """
        stages, stage, done = self._stages(observed), "calibrate", 0
        if folder is not None:
            own = {"policy": observed_hash(self._program, observed), "device": self._device.type}
            state, other = folder.begin({**(key or {}), **own})
            if state is not None:
                self._go_on(stages, state, folder)
                stage, done = f"resume: block {state.blocks}", state.blocks
            elif other:
                stage = f"calibrate again: {other} changed"
        work = [(part, block) for part in stages for block in part.stream.blocks]
        sizes = [len(block.nodes) for _, block in work]
        with report(stage, sum(sizes), "nodes") as advance:
            advance(sum(sizes[:done]))
            for index, (part, block) in enumerate(work[done:], done):
                part.stream.run(block, part.see, advance, part.prepare)
                following = work[min(index + 1, len(work) - 1)][0]
                if following is not part:
                    following.begin()
                if folder is not None:
                    folder.save(self._state(following.stream, index + 1))
        if folder is not None:
            folder.running = False

    def extremes(self, nodes: Sequence[fx.Node]) -> tuple[Tensor, Tensor]:
        """The lowest lows and highest highs of a linear that reads each of `nodes`."""
        lows, highs = zip(*(self.ranges[node] for node in nodes), strict=True)
        return torch.stack(lows).amin(0), torch.stack(highs).amax(0)

    def _stages(self, observed: Collection[fx.Node]) -> list["Stage"]:
        own = [node for node in observed if node.graph is self._program.graph.graph]
        stages = self._model_stages(own)
        if self._prediction is not None:
            others = [node for node in observed if node.graph is not self._program.graph.graph]
            stages.append(self._prediction_stage(self._prediction, others, stages[-1].stream))
        return stages

    def _model_stages(self, observed: Collection[fx.Node]) -> list["Stage"]:
        program, smoother, read = self._program, self.smoother, self.smoother.checkpoint.read
        inputs = [prefill_inputs(program, batch.ids, mask=batch.mask) for batch in self._batches]
        pairs = {pair.value for pair in program.pairs}
        seen = {*observed, *program.nodes(ops.moe_gate), *(self._solver.sites() if self._solver else ())}
        kept = () if self._prediction is None else (self._prediction.source,)

        def see(node: fx.Node, values: list[Any], inputs: Values) -> None:
            self._see(observed, node, values, inputs)

        def smooth_and_see(node: fx.Node, values: list[Any], inputs: Values) -> None:
            smoother.observe(node, values, inputs)  # first: it replaces `values` by the smoothed ones
            see(node, values, inputs)

        if not self._rounded:
            stream = Stream(program, read, inputs, seen | pairs, self._device, kept)
            return [Stage(stream, smooth_and_see, smoother.prepare)]
        rounded = Stage(Stream(program, RoundedWeights(program, read), inputs, seen, self._device, kept), see)
        if not pairs:
            return [rounded]
        return [Stage(Stream(program, read, inputs, pairs, self._device), smoother.observe, smoother.prepare), rounded]

    def _prediction_stage(self, after: Prediction, observed: Collection[fx.Node], model: Stream) -> "Stage":
        read: Read = self.smoother.checkpoint.read
        read = RoundedWeights(after.program, read) if self._rounded else read
        inputs = after.inputs(self._program, self._batches)
        stream = Stream(after.program, read, inputs, observed, self._device, handed=(after.hidden,))

        def see(node: fx.Node, values: list[Any], inputs: Values) -> None:
            if node in observed:
                self._keep_range(node, real(values, after.batches[node.meta["block"]]))

        return Stage(stream, see, begin=lambda: stream.restore(after.hidden, model.values.pop(after.source)))

    def _see(self, observed: Collection[fx.Node], node: fx.Node, values: list[Any], inputs: Values) -> None:
        if self._solver is not None:
            self._solver.observe(node, inputs)
        if node in observed:
            self._keep_range(node, real(values, self._batches))
        elif node.target == ops.moe_gate:
            count_experts(self.experts, node, values, self._batches)

    def _keep_range(self, node: fx.Node, values: list[Tensor]) -> None:
        low, high = (torch.stack(ends).float().cpu() for ends in self._observer(values))
        self.ranges[node] = low, high
        if not (low.isfinite() & high.isfinite()).all():
            fact = "calibration produced NaN or infinity."
            raise FxquantError(node.name, fact, "Check the checkpoint's weights.")

    def _state(self, stream: Stream, blocks: int) -> State:
        values = {node.name: stream.values[node] for node in stream.live()}
        ranges = {node.name: extremes for node, extremes in self.ranges.items()}
        return State(blocks, values, ranges, self.experts, self.smoother.transforms)

    def _go_on(self, stages: Sequence["Stage"], state: State, folder: CalibrationFolder) -> None:
        blocks, (stream, *later) = state.blocks, [stage.stream for stage in stages]
        while later and blocks >= len(stream.blocks):
            blocks, stream = blocks - len(stream.blocks), later.pop(0)
        live = stream.skip(blocks)
        if {node.name for node in live} != set(state.values):
            raise folder.damaged()
        for node in live:
            stream.restore(node, state.values[node.name])
        programs = [self._prediction.program] if self._prediction else []
        nodes = {node.name: node for program in (*programs, self._program) for node in program.graph.graph.nodes}
        self.ranges = {nodes[name]: extremes for name, extremes in state.ranges.items()}
        self.experts = dict(state.experts)
        self.smoother.restore(state.transforms)

    def _rows(self, values: Sequence[Tensor]) -> Tensor:
        """[tokens, k] of all batches."""
        return torch.cat([value.flatten(0, -2) for value in real(values, self._batches)])


def real(values: Sequence[Tensor], batches: Sequence[Batch]) -> list[Tensor]:
    """[tokens, k] of each batch, without padding."""
    return [real_tokens(value, batch.mask) for value, batch in zip(values, batches, strict=True)]


def observed_hash(program: Program, observed: Collection[fx.Node]) -> str:
    """Hash of the observed nodes, and of the recipes that scale search and GPTQ use."""
    recipes = sorted(program.recipes.items()) if program.pairs or any(solved_modules(program)) else []
    return hash_text(repr((sorted(node.name for node in observed), recipes)))
