"""Engine check: an engine's reading of the weight files against the graph, per quantized linear and projection.

Its reader, which knows the files only, stands in for the engine; each linear gets the float inputs of the graph's
quantization.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.engine_readers import Arithmetic, EngineReader, Loaded
from fxquant.engine_readers.linear_loader import MixedLinear
from fxquant.engine_readers.ranks import total_bound
from fxquant.errors import FxquantError
from fxquant.ops.quantized import GROUPED, LINEAR_FORMS, decode_deq_scale, expand_int4
from fxquant.processes.memory import return_freed_memory
from fxquant.program.linears import is_parameter
from fxquant.program.operands import arguments, item_of, operand_node
from fxquant.program.program import Program
from fxquant.runtime.large_matrix import rows_of_a_block
from fxquant.schemes.schemes import Recipe
from fxquant.verification.bounds import U, blocks, wide_products
from fxquant.verification.report import Check

_READ_CODES = [step.operator for form in LINEAR_FORMS.values() for step in form if "weight" in step.arguments]
READ_CODES = {*_READ_CODES, *(GROUPED[operator] for operator in _READ_CODES if operator in GROUPED)}
"""Operators that read the codes of a quantized linear."""
FLOAT64_STEPS = 16 * 2.0**-53


@dataclass(frozen=True)
class Site:
    """One quantized linear, or one projection of all experts: a call that reads its codes, and `node`, its result.

    x, x8       the float input and its integers, [..., k], or [M, k] sorted by expert; no integers if it stays float
    counts      rows per expert, None outside routed experts
    """

    node: fx.Node
    recipe: Recipe
    x: fx.Node
    x8: fx.Node | None
    weight: fx.Node
    second: fx.Node | None
    counts: fx.Node | None

    def load(self, reader: EngineReader, expert: int) -> Loaded:
        """The reader's linear; outside routed experts the only expert is 0."""
        module = self.recipe.modules[expert]
        if self.counts is not None:
            return reader.expert_linear(module, self.recipe.row_parallel)
        loaded = reader.linear(module, self.recipe.row_parallel)
        static = self.node.target is ops.dequantize_static
        return loaded.decode if static and isinstance(loaded, MixedLinear) else loaded

    def rows(self, counts: Tensor | None) -> dict[int, Any]:
        """Expert → index of its rows, for experts that have any; `counts` is the value of the node."""
        return {0: ...} if counts is None else dict(blocks(counts))

    def codes(self, values: dict[str, Any], expert: int) -> Tensor:
        """int8 [n, k]: the integers by which the graph multiplies."""
        weight = values[self.weight.name]
        second = None if self.second is None else values[self.second.name]
        if self.counts is not None:
            weight, second = weight[expert], None if second is None else second[expert]
        return expand_int4(weight, second) if self.recipe.int4 else weight


def sites(program: Program, block: str | None = None) -> Iterator[Site]:
    """Every quantized linear and expert projection of a block, or of all, in graph order."""
    for node in program.graph.graph.nodes:
        if node.op == "call_function" and node.target in READ_CODES and block in (None, node.meta["block"]):
            weight = operand_node(node, "weight")
            recipe = program.recipes.get(program.parameter(weight).module) if is_parameter(weight) else None
            yield from () if recipe is None else (_site(node, user, recipe) for user in node.users)


def _site(product: fx.Node, node: fx.Node, recipe: Recipe) -> Site:
    """The site of `product`, which reads a recipe's codes, and `node`, which reads the product and ends the linear."""
    given = arguments(product)
    weight, second, counts = given["weight"], given.get("weight_scale_second"), given.get("counts")
    if not recipe.scheme.integer_inputs:
        return Site(node, recipe, operand_node(node, "x"), None, weight, second, counts)
    x8 = operand_node(product, "x")
    return Site(node, recipe, operand_node(item_of(x8)[0], "x"), x8, weight, second, counts)


class EngineChecker:
    """Compares an engine's reading of a folder with the graph, on the reader's ranks.

    `doubtful` names the modules that the contract calls unverified: if the engine does not read one, this is reported,
    not a miss. `experts` limits the experts checked per layer. Integers must be equal, results within the reader's
    derived bound and the graph's own rounding. The distance of the device's arithmetic from the graph is reported, and
    only a value that is not finite is a miss. A static linear that the engine reads per token is held against the
    stored integers and scales, with the engine's own quantization of the input; how many there are is reported.
    """

    def __init__(
        self,
        program: Program,
        reader: EngineReader,
        doubtful: frozenset[str] = frozenset(),
        experts: int | None = None,
    ) -> None:
        self.program, self._doubtful, self._experts = program, doubtful, experts
        self._reader = reader
        engine = reader.shown
        self._codes = Check(f"{engine}: weights == graph", 0)
        self._inputs = Check(f"{engine}: activations == graph", 0)
        self._outputs = Check(f"{engine}: results ≈ graph", 0)
        self._device = Check(f"{engine}: device rounding", 0)
        self.checks = [self._codes, self._inputs, self._outputs, self._device]
        self._worst, self._furthest, self._unread, self._per_token = 0.0, 0.0, 0, 0

    def check(self, block: str, values: dict[str, Any]) -> None:
        """`values`: every value that the block's nodes read or make, by node name."""
        for site in sites(self.program, block):
            rows = site.rows(None if site.counts is None else values[site.counts.name])
            for expert in self._selected(site, list(rows)):
                try:
                    self._check_module(site, values, expert, rows.get(expert))
                except FxquantError as error:
                    self._refused(site, expert, error)
            return_freed_memory()

    def _refused(self, site: Site, expert: int, error: FxquantError) -> None:
        """Reported for a doubtful module, a miss for any other."""
        if site.recipe.module in self._doubtful:
            self._unread += 1
            self._codes.worst = f"{self._unread} unverified modules are not read"
        else:
            _expect(self._codes, False, f"{site.recipe.modules[expert]}: not loaded: {error}")

    def _selected(self, site: Site, with_rows: list[int]) -> list[int]:
        """All experts, or a sample that begins with those that have rows."""
        everyone = range(len(site.recipe.modules))
        if self._experts is None:
            return list(everyone)
        return sorted(dict.fromkeys([*with_rows, *everyone]), key=lambda expert: expert not in with_rows)[
            : self._experts
        ]

    def _check_module(self, site: Site, values: dict[str, Any], expert: int, rows: Any) -> None:
        module = site.recipe.modules[expert]
        if site.counts is None and (group := self._reader.fused_with(module)):
            self._reader.check_fused(group)
        loaded, codes = site.load(self._reader, expert), site.codes(values, expert)
        loaded_codes = loaded.codes()
        same = _same(loaded_codes, codes)
        _expect(self._codes, same, "" if same else f"{module}: {_difference(loaded_codes, codes)}")
        if rows is not None and site.x8 is not None and loaded_codes.shape == codes.shape:
            self._check_rows(site, values, expert, rows, loaded)

    def _check_rows(self, site: Site, values: dict[str, Any], expert: int, rows: Any, loaded: Loaded) -> None:
        assert site.x8 is not None
        module, x = site.recipe.modules[expert], values[site.x.name][rows]
        x8, expected = values[site.x8.name][rows], values[site.node.name][rows]
        quantized, x_scale = loaded.quantize(x, Arithmetic.EXACT)
        if site.node.target is ops.dequantize_static and x_scale.ndim == x.ndim:
            self._check_per_token(site, values, x, loaded)
            return
        _expect(self._inputs, torch.equal(quantized, x8), f"{module}: input: {_difference(quantized, x8)}")
        operands = _Operands.of(site, values, expert, rows)
        partials, bounds = loaded.partials(x, Arithmetic.EXACT), loaded.partial_bounds(x)
        bound = total_bound(partials, bounds) + 4 * U * (expected.double().abs() + 2 * operands.bias_magnitude())
        self._check_close(module, partials.sum(0).float(), expected, bound)
        if len(partials) > 1:
            ideal = operands.partials(x8, site.codes(values, expert), len(partials))
            for rank, (part, want, off) in enumerate(zip(partials, ideal, bounds, strict=True)):
                self._check_close(f"{module} on rank {rank}", part, want, off + FLOAT64_STEPS * want.abs())
        self._tell_device(module, loaded(x, Arithmetic.KERNEL), expected, values[site.node.name])

    def _check_per_token(self, site: Site, values: dict[str, Any], x: Tensor, loaded: Loaded) -> None:
        """The engine's result is `x8 @ codes * weight_scale * x_scale`; deq_scale / input_scale has two roundings."""
        assert site.x8 is not None
        self._per_token += 1
        self._inputs.worst = f"{self._per_token} static linears are read per token"
        x8, x_scale = loaded.quantize(x, Arithmetic.EXACT)
        input_scale = values[operand_node(site.x8, "input_scale").name].double()
        scale = _Operands.of(site, values, 0, ...).scale.double() / input_scale
        expected = wide_products(x8.double(), site.codes(values, 0)) * scale * x_scale.double()
        bound = loaded.bound(x) + 4 * U * expected.abs()
        self._check_close(site.recipe.module, loaded(x, Arithmetic.EXACT), expected, bound)
        graph = values[site.node.name]
        self._tell_device(site.recipe.module, loaded(x, Arithmetic.KERNEL), graph, graph)

    def _check_close(self, place: str, result: Tensor, expected: Tensor, bound: Tensor) -> None:
        error = (result.double() - expected.double()).abs()
        ok = bool((error <= bound).all())  # false for NaN
        largest = float((error / bound.clamp(min=2.0**-149)).nan_to_num(nan=torch.inf).max())
        fact = f"off by {float(error.max()):.3g}, {largest:.3g} times the bound"
        _expect(self._outputs, ok, f"{place}: {fact}")
        if largest >= self._worst:
            self._worst, self._outputs.worst = largest, f"{largest:.2g} of the bound at {place}"

    def _tell_device(self, module: str, result: Tensor, expected: Tensor, whole: Tensor) -> None:
        """Relative to the largest value of the whole tensor, of which `expected` may be one expert's rows."""
        _expect(self._device, torch.isfinite(result).all(), f"{module}: not finite on the device")
        largest = float(whole.abs().max())
        distance = float((result - expected).abs().max()) / largest if largest else 0.0
        if distance >= self._furthest:
            self._furthest, self._device.worst = distance, f"{distance:.2g} of the largest value at {module}"


@dataclass(frozen=True)
class _Operands:
    """What the graph's dequantization reads for one linear: scale [n], x_scale [..., 1], an integer or float bias."""

    scale: Tensor
    x_scale: Tensor
    quant_bias: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, site: Site, values: dict[str, Any], expert: int, rows: Any) -> "_Operands":
        given = {name: values[node.name] for name, node in arguments(site.node).items() if isinstance(node, fx.Node)}
        if site.node.target is ops.dequantize_static:
            return cls(decode_deq_scale(given["deq_scale"]), torch.ones(1), given["quant_bias"], None)
        scale = given["weight_scale"] if site.counts is None else given["weight_scale"][expert]
        return cls(scale.squeeze(-1), given["x_scale"][rows], None, given.get("bias"))

    def bias_magnitude(self) -> Tensor:
        """float64: magnitude of the bias, which may cancel a result but not its rounding errors."""
        return torch.zeros(1, dtype=torch.float64) if self.bias is None else self.bias.double().abs()

    def partials(self, x8: Tensor, codes: Tensor, ranks: int) -> Tensor:
        """float64 [ranks, ..., n]: each rank's sum over its slice of k, biases on the first."""
        parts = zip(x8.chunk(ranks, -1), codes.chunk(ranks, -1), strict=True)
        sums = torch.stack([wide_products(x.double(), part) for x, part in parts])
        if self.quant_bias is not None:
            sums[0] += self.quant_bias.double()
        results = sums * self.scale.double() * self.x_scale.double()
        if self.bias is not None:
            results[0] += self.bias.double()
        return results


def _expect(check: Check, condition: object, miss: str) -> None:
    check.total += 1
    check.expect(condition, miss)


def _same(result: Tensor, expected: Tensor) -> bool:
    """Equal integers, whatever their dtypes."""
    if result.shape != expected.shape:
        return False
    blocks_of_rows = (tensor.split(rows_of_a_block(expected.shape[1])) for tensor in (result, expected))
    return all(torch.equal(rows.int(), other.int()) for rows, other in zip(*blocks_of_rows, strict=True))


def _difference(result: Tensor, expected: Tensor) -> str:
    """How many elements differ, and the first."""
    if result.shape != expected.shape:
        return f"{list(result.shape)}, the graph has {list(expected.shape)}"
    different = (result != expected).nonzero()
    if not len(different):
        return "equal"
    place = tuple(different[0].tolist())
    values = f"{result[place].item()}, not {expected[place].item()}"
    return f"{len(different)} elements differ, first at {list(place)}: {values}"
