"""Run text through the float graph and record the input range of every static linear."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import FxquantError
from fxquant.execute import Progress, execute, prefill_inputs
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.linears import linear_sites
from fxquant.passes.observe import combine
from fxquant.policy import Policy
from fxquant.program import Program
from fxquant.weights import Read


@dataclass
class Calibrate(Pass):
    """Sets `activation` in the recipe of each static linear; the graph itself stays.

    `batches` are token ids int64 [batch, length]; None is an error only if the policy has a static scheme.
    """

    policy: Policy
    read: Read
    batches: list[Tensor] | None
    progress: Progress | None = None
    name = "calibrate"

    def __call__(self, program: Program) -> PassResult:
        inputs: dict[fx.Node, list[str]] = {}
        for site in linear_sites(program):
            recipe = program.recipes.get(site.module)
            if recipe is not None and recipe.scheme.static:
                inputs.setdefault(site.node.args[0], []).append(site.module)
        if not inputs:
            return PassResult(self.name)
        if not self.batches:
            way_out = "Pass --calib FILE, put calibration.jsonl beside the model, or use deepseek_w4a8_dynamic."
            raise FxquantError(f"policy {self.policy.name}", "static schemes need calibration text, none given.", way_out)
        ranges = self._observe(program, set(inputs))
        for node, modules in inputs.items():
            observed = combine(*ranges[node], self.policy.activation_statistic, program.dtype)
            for module in modules:
                program.recipes[module] = replace(program.recipes[module], activation=observed)
        return PassResult(self.name, tuple(module for modules in inputs.values() for module in modules))

    def _observe(self, program: Program, wanted: set[fx.Node]) -> dict[fx.Node, tuple[list[Tensor], list[Tensor]]]:
        ranges: dict[fx.Node, tuple[list[Tensor], list[Tensor]]] = {}

        def observe(node: fx.Node, values: list[Any]) -> None:
            if node in wanted:
                ranges[node] = ([value.min() for value in values], [value.max() for value in values])

        assert self.batches is not None
        inputs = [prefill_inputs(program, ids) for ids in self.batches]
        execute(program, self.read, inputs, observe, self.progress)
        for node, (lows, highs) in ranges.items():
            if not torch.isfinite(torch.stack(lows + highs)).all():
                raise FxquantError(node.name, "calibration gave NaN or infinity.", "Check the checkpoint's weights.")
        return ranges
