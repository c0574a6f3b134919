"""Smoothing during the calibration run: each pair gets its scales when its value is computed, and the graph continues
on the smoothed weights."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.calibration.smoothquant import SEARCH_TOKENS, ConsumerWeight, channel_scales
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.rotated import rotation_transforms
from fxquant.errors import FxquantError
from fxquant.policy.smooth_rules import PairKind, SmoothMethod
from fxquant.program.linears import pair_consumers
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Pair, Program
from fxquant.runtime.execute import Values
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, WeightAlgorithm
from fxquant.transforms.weight_transforms import WeightTransforms

SEARCH_EXPERTS = 2
"""Experts of a stack that a search looks at, evenly spaced."""
RealTokens = Callable[[list[Tensor]], Tensor]
"""Values [batch, length, k] per batch → float32 [tokens, k] without padding."""


class Smoother:
    """Observes a run of `program` on the weights of `checkpoint`, its own rotated and smoothed view of the given one.

    Weights are read one at a time: once for their largest magnitudes, besides the reads of the run itself.
    """

    def __init__(self, program: Program, checkpoint: Checkpoint, tokens: RealTokens) -> None:
        self._source = checkpoint.transformed(rotation_transforms(program.rotations, checkpoint))
        # a second one: `_source` must stay unsmoothed
        self.transforms = rotation_transforms(program.rotations, checkpoint)
        # placeholders of added biases: their names must be in the checkpoint before a pair sets the values
        self.transforms.tensors |= {
            name: torch.zeros(value.shape, dtype=value.dtype) for name, value in program.added.items()
        }
        self.checkpoint = checkpoint.transformed(self.transforms)
        self._program, self._tokens = program, tokens
        self._pairs = {pair.value: pair for pair in program.pairs}

    def restore(self, transforms: WeightTransforms) -> None:
        """Resume from the transforms of another run."""
        # in place: `self.checkpoint` holds this object
        vars(self.transforms).update(vars(transforms))

    def observe(self, node: fx.Node, values: list[Any], inputs: Values) -> None:
        """If `node` is the value of a pair, smooth the pair and replace `values` by those of the smoothed graph."""
        pair = self._pairs.get(node)
        if pair is None:
            return
        rows = self._tokens(values)
        largest, weights = rows.abs().amax(0).cpu(), self._largest_weights(pair)
        selected = rows[:: max(1, -(-len(rows) // SEARCH_TOKENS))].cpu()
        consumers = list(self._some_consumers(pair)) if pair.rule.method is SmoothMethod.FLEX else []
        scale = channel_scales(pair.rule, largest, weights, selected, consumers).to(self._program.dtype).float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            fact = f"smoothing scales {scale.min():g} … {scale.max():g} do not fit {self._program.dtype}."
            raise FxquantError(pair.value.name, fact, "Use method: none for it.")
        if pair.kind is PairKind.NORM:
            self._smooth_norm(pair, scale, rows, values, inputs[operand_node(node, "x")])
        else:
            self._smooth_linear(pair, scale, values)

    def _smooth_norm(self, pair: Pair, scale: Tensor, rows: Tensor, values: list[Tensor], before: list[Tensor]) -> None:
        transforms, (name,) = self.transforms, self._program.parameters[pair.maker].names
        weight, bias = self._source.read(name), None
        transforms.scales[name] = scale
        transforms.columns |= dict.fromkeys(pair_consumers(self._program, pair), name)
        if pair.rule.method is SmoothMethod.M4:
            shift = ((rows.amax(0) + rows.amin(0)) / 2).cpu()
            transforms.shifts[name] = shift
            bias = self._shifted_norm_bias(pair, shift, scale)
            self._shift_consumers(pair, shift)
        divided = transforms.tensors[name] = (weight.float() / scale).to(weight.dtype)
        eps, device = operand(pair.value, "eps"), values[0].device
        weight, bias = divided.float().to(device), None if bias is None else bias.to(device)
        # recomputed, not divided: the rest of the run must see the roundings of the smoothed norm
        values[:] = [ops.rms_norm(x, weight, eps, bias) for x in before]

    def _shifted_norm_bias(self, pair: Pair, shift: Tensor, scale: Tensor) -> Tensor:
        (name,) = self._program.parameter(operand_node(pair.value, "bias")).names
        old = self._source.read(name).float() if name in self._source.tensors else 0.0
        new = self.transforms.tensors[name] = (old - shift) / scale
        return new

    def _shift_consumers(self, pair: Pair, shift: Tensor) -> None:
        """bias' = bias + W @ shift, summed in float64 so that storing it is the only rounding."""
        for target in pair.consumers:
            parameter = self._program.parameters[target]
            (name,), (module,) = parameter.names, parameter.modules
            bias = tensor_name(module, "bias")
            weight = self._source.read(name)
            old = self._source.read(bias).double() if bias in self._source.tensors else 0.0
            self.transforms.tensors[bias] = (old + weight.double() @ shift.double()).to(weight.dtype)

    def _smooth_linear(self, pair: Pair, scale: Tensor, values: list[Tensor]) -> None:
        """Scale the rows of the weight that produce the attention's values; rows for keys stay."""
        (name,) = self._program.parameters[pair.maker].names
        self.transforms.scales[name] = scale
        self.transforms.rows[name] = operand(pair.value, "num_heads")
        self.transforms.columns |= dict.fromkeys(pair_consumers(self._program, pair), name)
        values[:] = [value / scale.to(value.device) for value in values]

    def _largest_weights(self, pair: Pair) -> Tensor:
        """float32 [k]: the largest magnitude of each column over all quantized weights that read the value."""
        largest = None
        for _, name in self._quantized(pair):
            columns = self._source.read(name).abs().amax(0).float()
            largest = columns if largest is None else torch.maximum(largest, columns)
        assert largest is not None
        return largest

    def _quantized(self, pair: Pair) -> Iterator[tuple[Recipe, str]]:
        for target in pair.consumers:
            parameter = self._program.parameters[target]
            recipe = self._program.recipes.get(parameter.module)
            if recipe is not None:
                yield from ((recipe, name) for name in parameter.names)

    def _some_consumers(self, pair: Pair) -> Iterator[ConsumerWeight]:
        for target in pair.consumers:
            parameter = self._program.parameters[target]
            recipe = self._program.recipes.get(parameter.module)
            if recipe is not None:
                names = parameter.names[:: max(1, len(parameter.names) // SEARCH_EXPERTS)]
                plain = replace(recipe, algorithm=WeightAlgorithm.MIN_MAX)
                yield from (ConsumerWeight(plain, self._source.read(name)) for name in names)
