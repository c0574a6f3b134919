"""Sensitivity: the cost of each quantized module alone, as noise in its own output and KL divergence of the model.

The float graph runs once for a few documents at a time. At each module the run continues from there a second time, with
that module in the output's integers and everything else in float: nothing before it is computed again.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.evaluation.divergence import CHUNK, log_probabilities, logits
from fxquant.evaluation.sensitivity_report import ModuleLoss, Sensitivity
from fxquant.passes import QuantizeExperts, QuantizeLinear
from fxquant.policy.kinds import Kind
from fxquant.program.linears import linear_sites
from fxquant.program.program import Program
from fxquant.progress import Advance, Reporter, silent
from fxquant.runtime.divergence import divergences
from fxquant.runtime.execute import Observer, execute, prefill_inputs
from fxquant.runtime.weight_providers import Read
from fxquant.schemes.roles import tensor_name
from fxquant.schemes.schemes import Recipe, tensor_specs


@dataclass
class _Module:
    """A module of the float graph that has recipes: one, or three where it is the routed experts of a layer.

    site           its call, the first one if the graph calls it more than once
    signal, noise  Σ y² and Σ (y − ŷ)² so far
    kl             sum over the tokens of each document so far
    """

    name: str
    kind: Kind
    site: fx.Node
    recipes: dict[str, Recipe] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0
    kl: list[Tensor] = field(default_factory=list)

    def alone(self, program: Program, rewritten: Program) -> Program:
        """A copy of the float `program` with only this module rewritten."""
        partial = copy.deepcopy(program)  # passes rewrite a program in place
        partial.recipes, partial.rules = self.recipes, rewritten.rules
        for rewrite in (QuantizeLinear(), QuantizeExperts()):
            rewrite.apply(partial)
        return partial

    def weights(self, original: Read, rounded: Read) -> Read:
        """Tensors of the recipes come from `rounded`, others from `original`: a weight has the same name in both."""
        made_by = self.recipes.values()
        owned = {
            tensor_name(module, role)
            for recipe in made_by
            for module in recipe.modules
            for role in tensor_specs(recipe)
        }
        return lambda name: rounded(name) if name in owned else original(name)

    def loss(self, tokens: Tensor) -> ModuleLoss:
        """With `tokens` int64 [documents]."""
        ratio = self.signal / self.noise if self.noise else math.inf
        sqnr = 10 * math.log10(ratio) if ratio else -math.inf
        schemes = "/".join(dict.fromkeys(recipe.scheme.value for recipe in self.recipes.values()))
        return ModuleLoss.of(self.name, self.kind, self.site.meta["block"], schemes, sqnr, torch.stack(self.kl), tokens)


def measure_sensitivity(
    original: tuple[Program, Read],
    quantized: tuple[Program, Read],
    batches: list[Tensor],
    report: Reporter = silent,
) -> Sensitivity:
    """Quantize one module at a time and score `batches`, documents int64 [1, length].

    original   the float graph with its weights, for kept tensors and all modules but one
    quantized  the rewritten graph with its weights, on the same model

    For one chunk of documents, the logits and all values that are needed later are in memory.
    """
    (program, read), (rewritten, quantized_read) = original, quantized
    modules = list(_modules(program, rewritten.recipes))
    together: list[Tensor] = []
    with report("sensitivity", len(batches) * (len(modules) + 1), "documents") as advance:
        for start in range(0, len(batches), CHUNK):
            chunk = batches[start : start + CHUNK]
            expected = [log_probabilities(document) for document in logits(program, read, chunk)]
            together += _divergence(expected, logits(rewritten, quantized_read, chunk))
            advance(len(chunk))
            along = _Along(original, quantized, modules, chunk, expected, advance)
            execute(program, read, along.inputs, along)
    tokens = torch.tensor([ids.shape[1] - 1 for ids in batches])
    return Sensitivity.of([module.loss(tokens) for module in modules], torch.stack(together), tokens)


def _modules(program: Program, recipes: dict[str, Recipe]) -> Iterator[_Module]:
    modules: dict[str, _Module] = {}
    for site in linear_sites(program):
        if site.module in recipes:
            experts = site.node.target is ops.moe_experts
            name = site.module.rpartition(".")[0] if experts else site.module
            modules.setdefault(name, _Module(name, site.kind, site.node)).recipes[site.module] = recipes[site.module]
    missing = set(recipes).difference(*(module.recipes for module in modules.values()))
    if missing:
        fact = "is quantized, but the float graph does not multiply by it."
        raise FxquantError(min(missing), fact, "Compare with the model that was compiled.")
    if not modules:
        raise FxquantError("--sensitivity", "nothing is quantized.", "Compile with a policy that quantizes.")
    yield from modules.values()


def _divergence(expected: list[Tensor], quantized: list[Tensor]) -> list[Tensor]:
    """Sum over the tokens of each document."""
    return [divergences(p, log_probabilities(q)).sum() for p, q in zip(expected, quantized, strict=True)]


class _Along:
    """Observes the float run, keeps values that later calls need, and branches off at each module."""

    def __init__(
        self,
        original: tuple[Program, Read],
        quantized: tuple[Program, Read],
        modules: list[_Module],
        batches: list[Tensor],
        expected: list[Tensor],
        advance: Advance,
    ) -> None:
        self._original, self._quantized, self._expected, self._advance = original, quantized, expected, advance
        self._modules = {module.site: module for module in modules}
        self._live: dict[fx.Node, list[Any]] = {}
        self.inputs = [prefill_inputs(original[0], ids) for ids in batches]

    def __call__(self, node: fx.Node, values: list[Any], live: object) -> None:
        if node in self._modules:  # before its float value is known, which the branch would take over
            self._branch(self._modules[node], values)
        self._live[node] = list(values)
        done = [argument for argument in node.all_input_nodes if all(user <= node for user in argument.users)]
        for argument in done if node.users else [*done, node]:
            self._live.pop(argument, None)

    def _branch(self, module: _Module, exact: list[Tensor]) -> None:
        partial = module.alone(self._original[0], self._quantized[0])
        nodes = {node.name: node for node in partial.graph.graph.nodes}
        known = {nodes[node.name]: values for node, values in self._live.items()}
        read = module.weights(self._original[1], self._quantized[1])
        outputs = execute(partial, read, self.inputs, _noise(module, exact), known=known)
        module.kl += _divergence(self._expected, [output[0] for output in outputs])
        self._advance(len(exact), at=f"{module.kind} {module.name}")


def _noise(module: _Module, exact: list[Tensor]) -> Observer:
    """An observer that adds up the noise of the module, whose last call has the name of the float one."""

    def observe(node: fx.Node, values: list[Any], live: object) -> None:
        if node.name == module.site.name:
            for y, rounded in zip(exact, values, strict=True):
                module.signal += float(y.double().square().sum())
                module.noise += float((y.double() - rounded.double()).square().sum())

    return observe
