"""Program of a found folder: its model's graph, rewritten under the types that the description gives."""

from collections import Counter
from dataclasses import dataclass, field, replace

import torch

from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.engines.engine import Engine
from fxquant.foreign.forms import group_size, group_size_of, possible_forms
from fxquant.foreign.found import FoundFolder
from fxquant.frontend.source import Source
from fxquant.inputs.limits import MTP_LAYERS
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.models.mtp import mtp_gate_biases, mtp_linears
from fxquant.passes import CheckCoverage, QuantizeExperts, QuantizeLinear, run_passes
from fxquant.passes.pair_smoothing import restore_biases
from fxquant.passes.write_form import expert_form
from fxquant.policy.kinds import Kind
from fxquant.policy.rule import GROUP_SIZES, Rule
from fxquant.program.linears import PROJECTIONS, linear_sites
from fxquant.program.program import Program
from fxquant.schemes.roles import module_and_role, tensor_name
from fxquant.schemes.schemes import ROW_PARALLEL_CHUNKS, Recipe, Scheme, why_not
from fxquant.schemes.weight_formats import WeightFormat


@dataclass
class FoundProgram:
    """`program` quantized as the folder is, `original` before it was; `faults`: why a module can't be what it is said
    to be, and then `program` is None. `forms`: formats that its tensors can be of, several if nothing tells them apart.
    `sizes`: group size → the first module that has it; 0: one scale per channel."""

    original: Program
    forms: set[WeightFormat]
    program: Program | None = None
    faults: list[str] = field(default_factory=list)
    sizes: dict[int, str] = field(default_factory=dict)

    def read_by(self, engine: Engine) -> bool:
        """Whether the tensors can be of the format that `engine` reads."""
        return engine.weight_format(max(self.sizes, default=0)) in self.forms

    def in_form_of(self, engine: Engine) -> Program:
        """The program in the format of `engine`, if its tensors can be of that; else as it is."""
        assert self.program is not None
        form = engine.weight_format(max(self.sizes, default=0))
        return _in_form(self.program, form) if form in self.forms else self.program


def found_program(found: FoundFolder, source: Source) -> FoundProgram:
    """The program of `found`, on the graph of `source`."""
    original, program = source.program(), source.program()
    restore_biases(program, found.infos.keys())
    types = _Types(found)
    recipes = _recipes(program, types)
    mtp = _mtp_recipes(program, source.config, types)
    modules = [module for recipe in (*recipes.values(), *mtp.values()) for module in recipe.modules]
    widths = {module: r.out_features for r in (*recipes.values(), *mtp.values()) for module in r.modules}
    sizes = group_size(found, modules)
    forms = possible_forms(found, program.dtype, widths)
    result = FoundProgram(original, forms, faults=types.faults, sizes=sizes)
    if len(sizes) > 1:
        said = ", ".join(f"{size} for {module}" for size, module in sorted(sizes.items()))
        types.faults.append(f"group sizes {said}; a folder has one")
    if not forms and not types.faults:
        types.faults.append("its quantized modules are not all in one format: some lack tensors that others have")
    if types.faults:
        return result
    program.recipes, program.mtp.recipes = recipes, mtp
    program = _in_form(program, min(forms))
    _give_rules(program)
    run_passes(program, [QuantizeLinear(), QuantizeExperts(), CheckCoverage()])
    result.program = program
    return result


@dataclass
class _Types:
    """Schemes of modules, and what is wrong with them."""

    found: FoundFolder
    faults: list[str] = field(default_factory=list)

    def of(self, modules: tuple[str, ...]) -> Scheme | None:
        """The one scheme of `modules`; None after a fault."""
        kinds = Counter(self.found.types.get(tensor_name(module, "weight"), "") for module in modules)
        kinds.pop("", None)  # the check of entries reports it
        if not kinds:
            return Scheme.FLOAT
        (kind, _), *others = kinds.most_common()
        if kind not in list(Scheme):
            self.faults.append(f"{modules[0]}: {kind[:60]} is not one of {', '.join(Scheme)}")
            return None
        for other, _ in others:
            odd = next(m for m in modules if self.found.types.get(tensor_name(m, "weight")) == other)
            self.faults.append(f"{odd}: {other[:60]}, the other experts of its layer are {kind}")
        return None if others else Scheme(kind)

    def recipe(self, recipe: Recipe) -> Recipe | None:
        """`recipe` with its group size, if its tensors fit the scheme."""
        first = next((m for m in recipe.modules if tensor_name(m, "weight") in self.found.infos), recipe.modules[0])
        if recipe.scheme.grouped:
            recipe = replace(recipe, group_size=group_size_of(self.found, first))
        info = self.found.infos.get(tensor_name(first, "weight"))
        reason = why_not(recipe)
        if reason:
            self.faults.append(f"{first}: {recipe.scheme}: {reason}")
        elif info is not None and info.dtype is not torch.int8:
            self.faults.append(f"{first}.weight: {recipe.scheme}, stored in {str(info.dtype).removeprefix('torch.')}")
        else:
            return recipe
        return None


def _recipes(program: Program, types: _Types) -> dict[str, Recipe]:
    recipes = {}
    for site in linear_sites(program):
        scheme = types.of(site.parameter.modules)
        if scheme is None or scheme is Scheme.FLOAT:
            continue
        n, k = program.graph.tensor(str(site.weight.target)).shape[-2:]
        given = site.bias is not None, site.row_parallel, program.dtype
        recipe = types.recipe(Recipe(site.module, site.parameter.modules, scheme, 0, n, k, *given))
        if recipe is not None and site.parameter.stacked and expert_form(recipe) is None:
            types.faults.append(f"{site.module}: {scheme}; routed experts have no static scheme")
        elif recipe is not None:
            recipes[site.module] = recipe
    _check_projections(program, recipes, types)
    return recipes


def _check_projections(program: Program, recipes: dict[str, Recipe], types: _Types) -> None:
    for site in linear_sites(program):
        if not site.parameter.stacked or types.faults:
            continue
        layer = module_and_role(site.module)[0]
        kinds = {name: recipes.get(tensor_name(layer, name)) for name in PROJECTIONS}
        if len({recipe and recipe.scheme for recipe in kinds.values()}) > 1:
            said = ", ".join(f"{name} {recipe.scheme if recipe else Scheme.FLOAT}" for name, recipe in kinds.items())
            types.faults.append(f"{layer}: {said}; engines give the projections of an expert one type")


def _mtp_recipes(program: Program, config: DeepseekV3Config, types: _Types) -> dict[str, Recipe]:
    """Recipes of the multi-token prediction layers that are stored, whatever config.json announces."""
    most = config.model_copy(update={"num_nextn_predict_layers": MTP_LAYERS})
    names = sorted({*types.found.infos, *types.found.types})
    layers = [path for path in mtp_paths(most) if any(name.startswith(f"{path}.") for name in names)]
    recipes: dict[str, Recipe] = {}
    for path in layers:
        for linear in mtp_linears(config, path):
            scheme = types.of(linear.modules)
            if scheme is None or scheme is Scheme.FLOAT:
                continue
            n, k = linear.out_features, linear.in_features
            biased = tensor_name(linear.module, "bias") in types.found.infos
            given = biased, _chunked(types.found, linear.modules), program.dtype
            recipe = types.recipe(Recipe(linear.module, linear.modules, scheme, 0, n, k, *given))
            recipes |= {linear.module: recipe} if recipe is not None else {}
        made = {module for recipe in recipes.values() for module in recipe.modules}
        own = [name for name in names if name.startswith(f"{path}.") and module_and_role(name)[0] not in made]
        program.mtp.float_tensors |= {name: module_and_role(name)[0] for name in own}
        biases = (name for name in mtp_gate_biases(config, path) if name in own)
        program.mtp.gate_biases = (*program.mtp.gate_biases, *biases)
    program.mtp.layers = tuple(layers)
    return recipes


def _chunked(found: FoundFolder, modules: tuple[str, ...]) -> bool:
    """Whether scale_bias has a column for each run of k; no graph runs these layers, to ask whether ranks split k."""
    info = found.infos.get(tensor_name(modules[0], "scale_bias"))
    return info is not None and info.shape[-1] == ROW_PARALLEL_CHUNKS


def _in_form(program: Program, form: WeightFormat) -> Program:
    scales = program.dtype if form.model_dtype_scales else torch.float32

    def formed(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
        return {m: replace(recipe, weight_format=form, scale_dtype=scales) for m, recipe in recipes.items()}

    return replace(
        program, recipes=formed(program.recipes), mtp=replace(program.mtp, recipes=formed(program.mtp.recipes))
    )


def _give_rules(program: Program) -> None:
    """For each module the rule that its type amounts to."""
    for parameter in program.parameters.values():
        recipe = program.recipes.get(parameter.module)
        if recipe is None:
            rule = Rule(kind=(parameter.kind,), path=parameter.module, scheme=Scheme.FLOAT)
        else:
            size = recipe.group_size if recipe.group_size in GROUP_SIZES else 0
            rule = Rule(path=parameter.module, scheme=recipe.scheme, group_size=size)
        program.rules[parameter.module] = rule
    for path in program.mtp.layers:
        schemes = {recipe.scheme for module, recipe in program.mtp.recipes.items() if module.startswith(f"{path}.")}
        quantized = Scheme.W8A8 if Scheme.W8A8 in schemes else Scheme.W8A8_DYNAMIC
        scheme = quantized if schemes else Scheme.FLOAT
        program.rules[path] = Rule(kind=(Kind.MTP,), path=path, scheme=scheme)
