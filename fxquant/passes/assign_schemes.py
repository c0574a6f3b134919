"""Scheme assignment: policy × graph → a recipe per linear to quantize, a rule per parameter that stays."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fxquant.errors import FxquantError
from fxquant.kernels.search import ROW_KERNELS
from fxquant.passes.base import Pass, PassResult
from fxquant.passes.write_form import expert_form
from fxquant.policy.group_sizes import choose
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import LEAVE_OUT, Policy, Rule
from fxquant.policy.rule import AUTO
from fxquant.program.linears import LinearSite, decided_modules, linear_sites
from fxquant.program.program import Program
from fxquant.schemes.roles import module_and_role
from fxquant.schemes.schemes import Recipe, Scheme, why_not
from fxquant.schemes.weight_formats import WeightFormat


@dataclass
class AssignSchemes(Pass):
    """Fills `program.recipes` and `program.rules`; the graph itself stays.

    Raises FxquantError for a linear that no rule covers, a scheme that does not fit a linear, a rule that matches
    nothing. `mtp` names the checkpoint's multi-token prediction layers, which are not in the graph: here they get
    their rules, which `AssignMtp` applies. `weight_format` gives the target's format for a group size of the int4
    linears (0: per channel, or there are none), `int4_group_size` the size that rules with `group_size: auto` get on
    `target`.
    """

    policy: Policy
    mtp: tuple[str, ...] = ()
    weight_format: Callable[[int], WeightFormat] = lambda group_size: WeightFormat.PACKED
    int4_group_size: int = 256
    target: str = "the target"
    name = "assign-schemes"

    def apply(self, program: Program) -> PassResult:
        sites = list(linear_sites(program))
        weights = {str(site.weight.target) for site in sites}
        biases = {str(site.bias.target) for site in sites if site.bias is not None}
        decided = [(site, self._rule(site.module, site.kind, True)) for site in sites]
        used = {rule for _, rule in decided}
        widths = {site.module: _width(program, site) for site, rule in decided if rule.group_size == AUTO}
        chosen = choose(self.target, self.int4_group_size, widths)
        for site, asked in decided:
            rule = asked.sized(chosen.size)
            program.rules[site.module] = rule
            if rule.quantizes:
                program.recipes[site.module] = _recipe(program, site, rule)
        for target, parameter in program.parameters.items():
            if target not in weights:
                rule = self._rule(parameter.module, parameter.kind, target in biases)
                used.add(rule)
                program.rules.setdefault(parameter.module, rule)
        program.mtp.layers = self.mtp
        for module in self.mtp:
            rule = self._rule(module, Kind.MTP, True)
            used.add(rule)
            program.rules[module] = rule
        weight_format = self.weight_format(self._group_size(program))
        scales = program.dtype if weight_format.model_dtype_scales else torch.float32
        for module, recipe in program.recipes.items():
            program.recipes[module] = replace(recipe, weight_format=weight_format, scale_dtype=scales)
        program.unused_rules = self.policy.unused_rules(used, decided_modules(program))
        skipped = {module: str(rule) for module, rule in program.rules.items() if not rule.quantizes}
        return PassResult(self.name, tuple(program.recipes), skipped, choices=(chosen.why,) if widths else ())

    def _group_size(self, program: Program) -> int:
        int4 = [recipe for recipe in program.recipes.values() if recipe.scheme.grouped]
        # reversed, so that the first module of each size stays in the dict
        first = {recipe.group_size: recipe.module for recipe in reversed(int4)}
        if len(first) > 1:
            fact = f"group sizes {sorted(first)}: " + ", ".join(f"{size} for {m}" for size, m in sorted(first.items()))
            way_out = "An output has one group_size: choose one."
            raise FxquantError(f"policy {self.policy.name}", f"{fact}.", way_out)
        return next(iter(first), 0)

    def _rule(self, module: str, kind: Kind, quantizable: bool) -> Rule:
        rule = self.policy.rule_for(module, kind, quantizable)
        if rule is not None and rule.scheme == LEAVE_OUT and kind is not Kind.MTP:
            fact = f"rule “{rule}” leaves out {module}, which the graph reads."
            raise FxquantError(f"policy {self.policy.name}", fact, f"{LEAVE_OUT} is for kind mtp; use FLOAT.")
        if rule is None:
            way_out = f"Add a rule for kind {kind} or path {module}; scheme FLOAT keeps it as it is."
            raise FxquantError(f"policy {self.policy.name}", f"no rule covers {module} ({kind}).", way_out)
        return rule


def _width(program: Program, site: LinearSite) -> int:
    return program.graph.tensor(str(site.weight.target)).shape[-1]


def _recipe(program: Program, site: LinearSite, rule: Rule) -> Recipe:
    weight = program.graph.tensor(str(site.weight.target))
    if {module_and_role(name)[1] for name in site.parameter.names} != {"weight"}:
        fact = f"{site.parameter.names[0]} is to be quantized, but engines load linears only from names in .weight."
        raise FxquantError(site.module, fact, "End its name in .weight, or use FLOAT for it.")
    recipe = Recipe(
        module=site.module,
        modules=site.parameter.modules,
        scheme=Scheme(rule.scheme),
        group_size=rule.group_size,
        out_features=weight.shape[-2],
        in_features=weight.shape[-1],
        bias=site.bias is not None,
        row_parallel=site.row_parallel,
        dtype=program.dtype,
        algorithm=rule.algorithm,
    )
    if site.parameter.stacked and expert_form(recipe) is None:
        raise FxquantError(site.module, _no_expert_form(recipe.scheme), "Use W8A8_DYNAMIC or W4A8_DYNAMIC.")
    if recipe.bits not in ROW_KERNELS[recipe.algorithm.scales].by_bits:
        fact = f"{recipe.algorithm} has no kernel for {recipe.bits}-bit weights."
        raise FxquantError(f"layer {site.module}", fact, "Use another algorithm or scheme for it.")
    reason = why_not(recipe)
    if reason:
        raise FxquantError(f"layer {site.module}", f"{recipe.scheme}: {reason}.", _way_out(recipe))
    return recipe


def _no_expert_form(scheme: Scheme) -> str:
    if scheme.static:
        return "routed experts have no static scheme: a batch may leave an expert without input."
    return f"routed experts do not support {scheme}."


def _way_out(recipe: Recipe) -> str:
    fitting = math.gcd(recipe.in_features, 256)
    if not recipe.group_size or why_not(replace(recipe, group_size=0)) is not None:
        return "Use another scheme for it, such as W8A8_DYNAMIC, which policy deepseek_w8a8 gives to experts."
    per_channel = "Its sizes fit one scale per channel: use policy deepseek_w4a8_per_channel, or group_size: 0"
    if fitting >= 32 and why_not(replace(recipe, group_size=fitting)) is None:
        return f"{per_channel}; or group_size: {fitting}, where the target loads it."
    return f"{per_channel}."
