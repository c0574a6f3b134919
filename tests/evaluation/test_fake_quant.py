"""The integer graph against the usual stand-in for it: weights and activations rounded, and multiplied as floats.

The stand-in works in float64, so a difference is rounding of the integer path in float32 and nothing else.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from places import EXAMPLE
from rewrites import ULP, Rewritten, rewrite
from torch import Tensor, fx

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.evaluation.divergence import document_scores, logits
from fxquant.frontend.source import open_source
from fxquant.kernels.activation import static_parameters
from fxquant.kernels.module_tensors import rounded_weight
from fxquant.program.program import Program
from fxquant.runtime.execute import execute, prefill_inputs
from fxquant.runtime.weight_providers import RecipeWeights
from fxquant.schemes.schemes import Recipe
from fxquant.text.load import load_batches
from fxquant.verification.engine_check import Site, sites

POLICIES = ["deepseek_w4a8", "deepseek_w4a8_per_channel", "deepseek_w8a8"]


def rounded_activation(recipe: Recipe, x: Tensor) -> Tensor:
    """float64 [..., k]: what the integers of `x` stand for, those made in float32 as the operators make them."""
    if recipe.scheme.static:
        assert recipe.activation is not None
        scale, offset = (value.to(recipe.dtype).float() for value in static_parameters(recipe.activation))
        codes = torch.round(x / scale + offset).clamp(-128, 127)
        return (codes.double() - offset.double()) * scale.double()
    largest = x.abs().amax(-1, keepdim=True)
    return torch.round(x * (127 / largest)).double() * (largest / 127).double()


def stand_in(site: Site, checkpoint: Checkpoint, x: Tensor, counts: Tensor | None) -> tuple[Tensor, Tensor]:
    """float64 [..., n]: the site's output, and how far float32 may be from it.

    The integer sum is exact; its conversion and the products with two scales round, in a static linear those of the
    sum, of `deq_scale` and of their product: three times ULP of the result. The stand-in's weights are codes times
    scale, rounded once each: ULP of `|x| @ |w|`, which is no less than the result. Adding a bias rounds once more; a
    static one is an integer first, half a step of the sum away from it. Products of these are below 2**-20 of them.
    """
    recipe, result, bound = site.recipe, None, None
    for expert, rows in site.rows(counts).items():
        module = recipe.modules[expert]
        rounded = rounded_activation(recipe, x[rows])
        weight = rounded_weight(recipe, checkpoint.read(f"{module}.weight")).double()
        y, allowed = rounded @ weight.T, 4 * ULP * (rounded.abs() @ weight.abs().T)
        if recipe.bias:
            bias = checkpoint.read(f"{module}.bias").double()
            y = y + bias
            allowed = (
                allowed + ULP * (y.abs() + bias.abs()) + (_half_step(recipe, weight) if recipe.scheme.static else 0)
            )
        if result is None or bound is None:
            result, bound = (y.new_zeros(*x.shape[:-1], y.shape[-1]) for _ in range(2))
        result[rows], bound[rows] = y, allowed * (1 + 2.0**-20)
    assert result is not None and bound is not None
    return result, bound


def _half_step(recipe: Recipe, weight: Tensor) -> Tensor:
    """Half of input_scale times weight_scale, [n]; the largest weight of a row has at least the code 127."""
    assert recipe.activation is not None
    return weight.abs().amax(-1) / 127 * float(static_parameters(recipe.activation)[0].to(recipe.dtype)) / 2


def check_sites(done: Rewritten) -> int:
    """Every one within its bound; how many there are."""
    all_sites = list(sites(done.program))
    for site in all_sites:
        counts = None if site.counts is None else done.values[site.counts.name]
        expected, bound = stand_in(site, done.checkpoint, done.values[site.x.name], counts)
        error = (done.values[site.node.name].double() - expected).abs()
        assert (error <= bound).all(), (site.node.name, float((error / bound).nan_to_num().max()))
    return len(all_sites)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_quantized_linear_is_its_stand_in(policy: str, under: Callable[[str], Rewritten]) -> None:
    """Two attentions, a dense MLP, a shared expert, and three projections of routed experts."""
    assert check_sites(under(policy)) == 2 * 4 + 3 + 3 + 3


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_dynamic"])
def test_with_a_bias_too(policy: str, tiny: Callable[..., Checkpoint]) -> None:
    done = rewrite(tiny(attention_bias=True), policy)
    assert check_sites(done) == 2 * 4 + 3 + 3 + 3
    assert sum(recipe.bias for recipe in done.program.recipes.values()) == 2 * 3


def test_one_code_off_is_seen(under: Callable[[str], Rewritten]) -> None:
    """One wrong code of one activation changes almost every output by more than ten times its bound."""
    done = under("deepseek_w4a8")
    for site in sites(done.program):
        if site.counts is None and not site.recipe.scheme.static:
            x = done.values[site.x.name]
            expected, bound = stand_in(site, done.checkpoint, x, None)
            largest = x.abs().amax(-1, keepdim=True)
            moved = rounded_activation(site.recipe, x)
            moved[..., :1] += (largest / 127).double()
            weight = rounded_weight(site.recipe, done.checkpoint.read(f"{site.recipe.module}.weight")).double()
            change = (moved @ weight.T - expected).abs()
            assert (change > 10 * bound).double().mean() > 0.9, site.node.name


class FakeQuantization:
    """Observes an execution, and puts the stand-in's result, in float32, in place of every quantized linear's."""

    def __init__(self, program: Program, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._sites = {site.node: site for site in sites(program)}
        self._inputs = {node for site in self._sites.values() for node in (site.x, site.counts) if node is not None}
        self._values: dict[fx.Node, list[Any]] = {}

    def __call__(self, node: fx.Node, values: list[Any], live: object) -> None:
        site = self._sites.get(node)
        if site is not None:
            counts = [None] * len(values) if site.counts is None else self._values[site.counts]
            pairs = zip(self._values[site.x], counts, strict=True)
            values[:] = [stand_in(site, self._checkpoint, x, count)[0].float() for x, count in pairs]
        if node in self._inputs:
            self._values[node] = list(values)


@pytest.mark.parametrize("policy", ["deepseek_w4a8", "deepseek_w4a8_per_channel"])
def test_both_have_the_same_divergence(policy: str) -> None:
    """On the trained example: equal to 2 %, measured 0.4 %.

    Rounding alone moves a logit by some 1e-5. It also moves an activation that lies within it of a tie to the next
    code, and a change of one code, seen by all that follows, moves logits by up to half a unit.
    """
    source = open_source(EXAMPLE)
    checkpoint, program = source.checkpoint, source.program()
    batches = load_batches(EXAMPLE / "evaluation.jsonl", checkpoint, 4, 64)
    expected = logits(program, checkpoint.read, batches)
    done = rewrite(checkpoint, policy, program)
    read = RecipeWeights(done.program, checkpoint)
    inputs = [prefill_inputs(done.program, ids) for ids in batches]
    fake = [logits[0] for logits in execute(done.program, read, inputs, FakeQuantization(done.program, checkpoint))]
    exact = logits(done.program, read, batches)
    kl = [
        sum(float(scores[2].sum()) for scores in document_scores(batches, expected, quantized))
        for quantized in (exact, fake)
    ]
    assert kl[1] == pytest.approx(kl[0], rel=0.02)
