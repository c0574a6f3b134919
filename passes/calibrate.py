"""Run text through the float graph and record the input range of every static linear."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import FxquantError
from fxquant.execute import execute, prefill_inputs
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.linears import linear_sites
from fxquant.passes.observe import combine
from fxquant.policy import CalibrationWeights, Policy
from fxquant.program import Program, input_node
from fxquant.progress import Reporter, silent
from fxquant.weights import Read, RoundedReader

Ranges = dict[fx.Node, tuple[list[Tensor], list[Tensor]]]


@dataclass
class Calibrate(Pass):
    """Sets `activation` in the recipe of each static linear; the graph itself stays.

    The forward runs in float32 on the weights that the policy names, the checkpoint's or the rounded ones.
    `batches` gives token ids int64 [batch, length]; it is asked, and None is an error, only if a scheme is static.
    """

    policy: Policy
    read: Read
    batches: Callable[[], list[Tensor] | None]
    report: Reporter = silent
    name = "calibrate"

    def __call__(self, program: Program) -> PassResult:
        inputs: dict[fx.Node, list[str]] = {}
        for site in linear_sites(program):
            recipe = program.recipes.get(site.module)
            if recipe is not None and recipe.scheme.static:
                inputs.setdefault(input_node(site.node, 0), []).append(site.module)
        if not inputs:
            return PassResult(self.name)
        batches = self.batches()
        if not batches:
            way_out = "Pass --calib FILE, put calibration.jsonl beside the model, or use deepseek_w4a8_dynamic."
            raise FxquantError(
                f"policy {self.policy.name}", "static schemes need calibration text, none given.", way_out
            )
        ranges = self._observe(program, set(inputs), batches)
        for node, modules in inputs.items():
            observed = combine(*ranges[node], self.policy.activation_statistic, program.dtype)
            for module in modules:
                program.recipes[module] = replace(program.recipes[module], activation=observed)
        return PassResult(self.name, tuple(module for modules in inputs.values() for module in modules))

    def _observe(self, program: Program, wanted: set[fx.Node], batches: list[Tensor]) -> Ranges:
        ranges: Ranges = {}

        def observe(node: fx.Node, values: list[Any]) -> None:
            if node in wanted:
                ranges[node] = ([value.min() for value in values], [value.max() for value in values])

        inputs = [prefill_inputs(program, ids) for ids in batches]
        rounded = self.policy.calibration_weights is CalibrationWeights.ROUNDED
        read = RoundedReader(program, self.read) if rounded else self.read
        with self.report("calibrate", len(program.graph.graph.nodes), "nodes") as advance:
            execute(program, read, inputs, observe, advance)
        for node, (lows, highs) in ranges.items():
            if not torch.isfinite(torch.stack(lows + highs)).all():
                raise FxquantError(node.name, "calibration gave NaN or infinity.", "Check the checkpoint's weights.")
        return ranges
