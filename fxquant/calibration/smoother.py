"""Smoothing during the calibration run: each pair gets its scales when its value is computed, and the graph continues
on the smoothed weights."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.functional import silu

from fxquant import ops
from fxquant.calibration.smoothquant import SEARCH_TOKENS, ConsumerWeight, channel_scales
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.rotated import rotation_transforms
from fxquant.errors import FxquantError
from fxquant.policy.smooth_rules import PairKind, SmoothMethod
from fxquant.program.linears import PROJECTIONS, pair_consumers
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Pair, Program
from fxquant.runtime.execute import Values
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, WeightAlgorithm
from fxquant.transforms.weight_transforms import WeightTransforms

SEARCH_EXPERTS = 2
"""Experts of a stack that a search looks at, evenly spaced."""
EXPERT_TOKENS = 8
"""An expert that fewer tokens chose keeps scale 1: their largest magnitudes say nothing about those of others."""
RealTokens = Callable[[list[Tensor]], Tensor]
"""Values [batch, length, k] per batch → float32 [tokens, k] without padding."""
Reader = tuple[Recipe, str]
"""A quantized weight that reads a value: how it is quantized, and its name."""


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
        if pair is None or node.target == ops.moe_experts:
            return
        rows = self._tokens(values)
        scale = self._scale(pair, rows, list(self._quantized(pair)))
        if pair.kind is PairKind.NORM:
            self._smooth_norm(pair, scale, rows, values, inputs[operand_node(node, "x")])
        else:
            self._smooth_linear(pair, scale, values)

    def prepare(self, node: fx.Node, inputs: Values) -> None:
        """Before `node` runs: if it is the experts of a pair, smooth each on its own tokens."""
        pair = self._pairs.get(node)
        if pair is None or node.target != ops.moe_experts:
            return
        x, ids = (self._tokens(inputs[operand_node(node, name)]) for name in ("x", "ids"))
        gates, ups, downs = (self._program.parameter(operand_node(node, name)) for name in PROJECTIONS)
        recipe = self._program.recipes[downs.module]
        for expert, (gate, up, down) in enumerate(zip(gates.names, ups.names, downs.names, strict=True)):
            rows = x[(ids == expert).any(-1)]
            if len(rows) >= EXPERT_TOKENS:
                # smoothed weights: the norm before the experts has its scales by now
                gate_proj, up_proj = (self.checkpoint.read(name).float().to(x.device) for name in (gate, up))
                hidden = silu(rows @ gate_proj.T) * (rows @ up_proj.T)
                self._scale_rows(up, self._scale(pair, hidden, [(recipe, down)]), 1, [down])

    def _scale(self, pair: Pair, rows: Tensor, readers: Sequence[Reader]) -> Tensor:
        """The scales float32 [k] of values `rows` [tokens, k] that `readers` multiply, exact in the model's dtype."""
        largest, weights = rows.abs().amax(0).cpu(), self._largest_weights(readers)
        selected = rows[:: max(1, -(-len(rows) // SEARCH_TOKENS))].cpu()
        consumers = list(self._some_consumers(pair, readers)) if pair.rule.method is SmoothMethod.FLEX else []
        scale = channel_scales(pair.rule, largest, weights, selected, consumers)
        if pair.kind is PairKind.SWIGLU:  # the largest value stays as large, or float16 might overflow where it did not
            scale = scale * ((largest / scale).max() / largest.max().clamp(min=torch.finfo(torch.float32).tiny))
        scale = scale.to(self._program.dtype).float()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            fact = f"smoothing scales {scale.min():g} … {scale.max():g} do not fit {self._program.dtype}."
            raise FxquantError(pair.value.name, fact, "Use method: none for it.")
        return scale

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
        """Scale the rows of the weight that produce the values; of an attention's, rows for keys stay."""
        (name,) = self._program.parameters[pair.maker].names
        heads = operand(pair.value, "num_heads") if pair.kind is PairKind.LINEAR else 1
        self._scale_rows(name, scale, heads, pair_consumers(self._program, pair))
        values[:] = [value / scale.to(value.device) for value in values]

    def _scale_rows(self, maker: str, scale: Tensor, heads: int, readers: Iterable[str]) -> None:
        self.transforms.scales[maker] = scale
        self.transforms.rows[maker] = heads
        self.transforms.columns |= dict.fromkeys(readers, maker)

    def _largest_weights(self, readers: Sequence[Reader]) -> Tensor:
        """float32 [k]: the largest magnitude of each column over all quantized weights that read a value."""
        largest = None
        for _, name in readers:
            columns = self._source.read(name).abs().amax(0).float()
            largest = columns if largest is None else torch.maximum(largest, columns)
        assert largest is not None
        return largest

    def _quantized(self, pair: Pair) -> Iterator[Reader]:
        for target in pair.consumers:
            parameter = self._program.parameters[target]
            recipe = self._program.recipes.get(parameter.module)
            if recipe is not None:
                yield from ((recipe, name) for name in parameter.names)

    def _some_consumers(self, pair: Pair, readers: Sequence[Reader]) -> Iterator[ConsumerWeight]:
        for target in pair.consumers:
            module = self._program.parameters[target].module
            named = [(recipe, name) for recipe, name in readers if recipe.module == module]
            for recipe, name in named[:: max(1, len(named) // SEARCH_EXPERTS)]:
                plain = replace(recipe, algorithm=WeightAlgorithm.MIN_MAX)
                yield ConsumerWeight(plain, self._source.read(name))
