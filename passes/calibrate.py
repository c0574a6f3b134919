"""Run text through the float graph and record the input range of every static linear."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.batches import Batch, batched, count_experts, real_tokens
from fxquant.calibration import Calibration, Seen, rounded_by, text_hash
from fxquant.errors import FxquantError
from fxquant.execute import execute, prefill_inputs
from fxquant.kernels.activation import static_parameters
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.linears import linear_sites
from fxquant.passes.observe import combine
from fxquant.policy import CalibrationWeights, Policy
from fxquant.program import Program, input_node
from fxquant.progress import Reporter, silent
from fxquant.schemes import Recipe
from fxquant.structure import structural_hash
from fxquant.weights import Read, RoundedReader

Ranges = dict[fx.Node, tuple[list[Tensor], list[Tensor]]]
WAY_OUT = "Pass --calib FILE, put calibration.jsonl beside the model, or use deepseek_w4a8_dynamic."


@dataclass
class Calibrate(Pass):
    """Sets `activation` in the recipe of each static linear; the graph itself stays.

    The forward runs in float32 on the weights that the policy names, the checkpoint's or the rounded ones.
    `batches` gives documents, token ids int64 [1, length]; it is asked, and None is an error, only if a scheme is
    static and no `given` calibration takes its place. `batch_size` of them run together, filled up with the id `pad`.
    `earlier` are calibrations of other runs: one that saw the same saves the forward. `used` is what the ranges were
    made of.
    """

    policy: Policy
    read: Read
    batches: Callable[[], list[Tensor] | None]
    report: Reporter = silent
    given: Calibration | None = None
    earlier: Sequence[Calibration] = ()
    used: Calibration | None = None
    batch_size: int = 1
    pad: int = 0
    name = "calibrate"

    def apply(self, program: Program) -> PassResult:
        inputs: dict[str, list[fx.Node]] = {}
        for site in linear_sites(program):
            recipe = program.recipes.get(site.module)
            if recipe is not None and recipe.scheme.static:
                inputs.setdefault(site.module, []).append(input_node(site.node, 0))
        if not inputs:
            return PassResult(self.name)
        self.used = self._given(program, inputs) if self.given else self._calibrated(program, inputs)
        for module in inputs:
            activation = combine(*self.used.ranges[module], self.policy.activation_statistic, program.dtype)
            program.recipes[module] = replace(program.recipes[module], activation=activation)
            _check_range(program.recipes[module])
        return PassResult(self.name, tuple(inputs))

    def _given(self, program: Program, inputs: dict[str, list[fx.Node]]) -> Calibration:
        """The calibration handed in, if it is of this graph, of such weights, and has every module."""
        assert self.given is not None
        graph, weights = structural_hash(program), self._weights(program)
        seen, missing = self.given.seen, sorted(set(inputs) - set(self.given.ranges))
        facts = {
            f"graph {seen.graph[:12]}, the model's is {graph[:12]}": seen.graph == graph,
            f"{seen.weights} weights, policy {self.policy.name} wants {weights}": seen.weights == weights,
            f"no range of {missing[0] if missing else ''}": not missing,
        }
        wrong = next((fact for fact, holds in facts.items() if not holds), None)
        if wrong is not None:
            raise FxquantError("--calibration", f"of another kind: {wrong}.", "Calibrate again: pass --calib TEXT.")
        return self.given

    def _calibrated(self, program: Program, inputs: dict[str, list[fx.Node]]) -> Calibration:
        documents = self.batches()
        if not documents:
            fact = "static schemes need calibration text, none given."
            raise FxquantError(f"policy {self.policy.name}", fact, WAY_OUT)
        batches = batched(documents, self.batch_size, self.pad)
        seen = Seen(structural_hash(program), self._weights(program), text_hash(batches))
        for known in self.earlier:
            if known.seen == seen and set(inputs) <= set(known.ranges):
                return known
        experts: dict[str, Tensor] = {}
        ranges = self._observe(program, {node for nodes in inputs.values() for node in nodes}, batches, experts)
        tokens = torch.tensor([batch.tokens for batch in batches])
        extremes = {module: _extremes(ranges, nodes) for module, nodes in inputs.items()}
        return Calibration(seen, tokens, extremes, experts)

    def _weights(self, program: Program) -> str:
        rounded = self.policy.calibration_weights is CalibrationWeights.ROUNDED
        return rounded_by(program.recipes) if rounded else self.policy.calibration_weights.value

    def _observe(
        self, program: Program, wanted: set[fx.Node], batches: list[Batch], experts: dict[str, Tensor]
    ) -> Ranges:
        """What each of `wanted` gives on real tokens; `experts` gets how many of them each expert saw."""
        ranges: Ranges = {}

        def observe(node: fx.Node, values: list[Any]) -> None:
            if node in wanted:
                real = [real_tokens(value, batch.mask) for value, batch in zip(values, batches, strict=True)]
                ranges[node] = ([value.min() for value in real], [value.max() for value in real])
            elif node.target == ops.moe_gate:
                count_experts(experts, node, values, batches)

        inputs = [prefill_inputs(program, batch.ids, mask=batch.mask) for batch in batches]
        rounded = self.policy.calibration_weights is CalibrationWeights.ROUNDED
        read = RoundedReader(program, self.read) if rounded else self.read
        with self.report("calibrate", len(program.graph.graph.nodes), "nodes") as advance:
            execute(program, read, inputs, observe, advance)
        for node, (lows, highs) in ranges.items():
            if not torch.isfinite(torch.stack(lows + highs)).all():
                raise FxquantError(node.name, "calibration gave NaN or infinity.", "Check the checkpoint's weights.")
        return ranges


def _extremes(ranges: Ranges, nodes: list[fx.Node]) -> tuple[Tensor, Tensor]:
    """Of a linear that is called on each of `nodes`: in each batch the smallest minimum and largest maximum."""
    lows = [torch.stack(values).min() for values in zip(*(ranges[node][0] for node in nodes), strict=True)]
    highs = [torch.stack(values).max() for values in zip(*(ranges[node][1] for node in nodes), strict=True)]
    return torch.stack(lows), torch.stack(highs)


def _check_range(recipe: Recipe) -> None:
    """Scale and offset must be numbers in the model's dtype; float16 ends at 65504."""
    observed = recipe.activation
    assert observed is not None
    if not all(torch.isfinite(value.to(recipe.dtype)) for value in static_parameters(observed)):
        fact = f"its input, {observed.low:g} … {observed.high:g}, does not fit {recipe.dtype} arithmetic."
        raise FxquantError(recipe.module, fact, "Use activation_statistic: min_max, or W8A8_DYNAMIC for it.")
