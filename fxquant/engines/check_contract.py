"""Contract check: recipes × contract × ranks → what the engine refuses, and what is unverified."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from fxquant.engines.contract import Cell, Contract, Verdict
from fxquant.policy.kinds import Kind
from fxquant.schemes.schemes import Recipe

EXPERT_PARALLEL = "keep experts whole with expert parallelism, --ep N"
PER_CHANNEL = ", as policy deepseek_w4a8_per_channel has it"
INT8 = "Use W8A8_DYNAMIC for it, as policy deepseek_w8a8 does."


@dataclass(frozen=True)
class Linear:
    """What the check needs of one linear, float ones too.

    heads   of its attention, split over ranks, else 0
    inside  kind of its module, where `kind` says that it is of a prediction layer
    """

    recipe: Recipe
    kind: Kind
    heads: int = 0
    inside: Kind | None = None

    @property
    def section(self) -> Kind:
        """The kind by which config.json gives its type: attention of prediction layers is read as any other."""
        return Kind.ATTENTION if self.inside is Kind.ATTENTION else self.kind

    @property
    def experts(self) -> int:
        """How many experts it is the projection of; 0: none."""
        stacked = self.kind is Kind.ROUTED_EXPERT or len(self.recipe.modules) > 1
        return len(self.recipe.modules) if stacked else 0


@dataclass(frozen=True)
class Finding:
    """One rule of the contract that a linear does not meet, or meets without proof."""

    module: str
    verdict: Verdict
    fact: str
    way_out: str
    reference: str


def check(
    contract: Contract, linears: Iterable[Linear], ranks: int = 1, mix: bool | None = None, ep: int = 1
) -> list[Finding]:
    """All findings, in the order of the linears: verdicts on schemes, sizes, ranks, then fused modules.

    ranks  tensor-parallel ranks
    mix    whether the engine will run shared experts as routed ones; None: as the schemes need it
    ep     expert-parallel ranks, a multiple of `ranks`: each has whole experts; 1: `ranks` split every expert
    """
    linears = list(linears)
    findings = [*_ranks(contract, ranks, ep), *_dtypes(contract, linears)]
    for linear in linears:
        findings += _schemes(contract, linear)
        findings += _expert_ranks(contract, linear, ranks, ep)
        findings += _sizes(contract, linear, 1 if ep > 1 and _runs_as_expert(contract, linear) else ranks)
        findings += _mix(contract, linear, mix)
    return [*findings, *_fused(contract, linears), *_sections(contract, linears)]


def refusal(findings: list[Finding]) -> Finding | None:
    """The first refusal; None without one."""
    return next((finding for finding in findings if finding.verdict is Verdict.REFUSED), None)


def _ranks(contract: Contract, ranks: int, ep: int) -> Iterator[Finding]:
    rule = contract.tensor_parallel
    several = len(rule.sizes) > 1
    if ranks not in rule.sizes:
        sizes = ", ".join(map(str, rule.sizes))
        way_out = f"Use --tp with one of {sizes}; more ranks with --ep." if several else "Run it on one rank."
        fact = f"tensor-parallel ranks must be {sizes}: {rule.why}"
        yield Finding("", Verdict.REFUSED, fact, way_out, rule.reference)
    if ep > 1 and not several:
        fact = f"{ep} expert-parallel ranks: {rule.why}"
        yield Finding("", Verdict.REFUSED, fact, "Run it on one rank.", rule.reference)
    elif ep > 1 and ep % ranks:
        fact = f"{ep} expert-parallel ranks are not a multiple of {ranks} tensor-parallel ranks"
        yield Finding("", Verdict.REFUSED, fact, f"Use --ep {ranks} or a multiple of it.", rule.reference)


def _expert_ranks(contract: Contract, linear: Linear, ranks: int, ep: int) -> Iterator[Finding]:
    recipe, rule = linear.recipe, contract.tensor_parallel
    if ep > 1 and linear.experts and linear.experts % ep:
        fact = f"{linear.experts} experts do not split over {ep} expert-parallel ranks"
        yield _size(recipe, fact, f"Use --ep with a number that divides {linear.experts}.", rule.reference)
    whole = (rule.experts_whole == "int4" and recipe.int4) or (rule.experts_whole == "grouped" and recipe.group_size)
    if whole and ranks > 1 and ep == 1 and linear.experts:
        fact = f"experts that {ranks} ranks split are read wrong"
        yield _size(recipe, fact, f"Use one rank, or {EXPERT_PARALLEL}.", rule.reference)


def _runs_as_expert(contract: Contract, linear: Linear) -> bool:
    """Whether expert parallelism keeps it whole: a routed expert, or a shared one that runs with them."""
    rule = contract.shared_expert_mix
    mixed = rule is not None and linear.kind is Kind.SHARED_EXPERT and linear.recipe.scheme is rule.needs
    return bool(linear.experts) or mixed


def _dtypes(contract: Contract, linears: list[Linear]) -> Iterator[Finding]:
    rule = contract.dtypes
    dtype = str(linears[0].recipe.dtype).removeprefix("torch.") if linears else rule.accepted[0]
    if dtype not in rule.accepted:
        way_out = f"Set torch_dtype in config.json to {' or '.join(rule.accepted)}."
        yield Finding(
            "", rule.others, f"models in {dtype}: the engine loads {', '.join(rule.accepted)}", way_out, rule.reference
        )


def _schemes(contract: Contract, linear: Linear) -> Iterator[Finding]:
    recipe = linear.recipe
    cell = contract.cell(linear.kind, recipe)
    if cell.verdict is not Verdict.ACCEPTED:
        yield Finding(recipe.module, cell.verdict, _fact(recipe, linear.kind, cell), cell.way_out, cell.reference)


def _fact(recipe: Recipe, kind: Kind, cell: Cell) -> str:
    size = f" with group_size {recipe.group_size}" if recipe.group_size else ""
    per_channel = " per channel" if recipe.int4 and not recipe.group_size else ""
    return f"{recipe.scheme}{size}{per_channel} on {kind}: {cell.why or cell.verdict.value}"


def _sizes(contract: Contract, linear: Linear, ranks: int) -> Iterator[Finding]:
    recipe, reference = linear.recipe, contract.tensor_parallel.reference
    n, k = recipe.out_features, recipe.in_features
    if linear.heads and recipe.row_parallel and linear.heads % ranks:  # told once a layer, where heads come together
        fact = f"{linear.heads} heads do not split over {ranks} ranks"
        yield _size(recipe, fact, _divides(linear.heads), contract.tensor_parallel.heads or reference)
    if linear.kind is not Kind.ATTENTION:
        axis, size = ("in_features", k) if recipe.row_parallel else ("out_features", n)
        if size % ranks:
            yield _size(recipe, f"{axis} {size} does not split over {ranks} ranks", _divides(size), reference)
            return
        n, k = (n, k // ranks) if recipe.row_parallel else (n // ranks, k)
    part = f" on each of {ranks} ranks" if ranks > 1 else ""
    if recipe.group_size and contract.tensor_parallel.whole_groups and k % recipe.group_size:
        fact = f"in_features {k}{part} is not a multiple of group_size {recipe.group_size}"
        fewer = f"Use fewer ranks, {EXPERT_PARALLEL}, or group_size 0."
        yield _size(recipe, fact, fewer if ranks > 1 else f"Use group_size: 0{PER_CHANNEL}.", reference)
    for rule in contract.multiples:
        if linear.kind in rule.kind and recipe.scheme in rule.scheme:
            for axis, size, multiple in (("in_features", k, rule.in_features), ("out_features", n, rule.out_features)):
                if size % multiple:
                    fact = f"{axis} {size}{part} is not a multiple of {multiple}"
                    way_out = f"Use fewer ranks, or {EXPERT_PARALLEL}." if part else INT8
                    yield _size(recipe, fact, way_out, rule.reference)
            if rule.largest_in_features and k > rule.largest_in_features:
                fact = f"in_features {k}{part} is more than {rule.largest_in_features}"
                yield _size(recipe, fact, INT8, rule.reference)


def _divides(size: int) -> str:
    return f"Use a number of ranks that divides {size}."


def _size(recipe: Recipe, fact: str, way_out: str, reference: str) -> Finding:
    return Finding(recipe.module, Verdict.REFUSED, f"{recipe.scheme}: {fact}", way_out, reference)


def _mix(contract: Contract, linear: Linear, mix: bool | None) -> Iterator[Finding]:
    rule = contract.shared_expert_mix
    if rule is None or linear.kind is not Kind.SHARED_EXPERT or mix is None:
        return
    has = linear.recipe.scheme is rule.needs
    if has is not mix:
        state = "on" if mix else "off"
        fact = f"{linear.recipe.scheme} on {linear.kind}, with {rule.switch} {state}"
        way_out = f"Turn it {'off' if mix else 'on'}, or give shared experts {rule.needs if mix else 'W8A8_DYNAMIC'}."
        yield Finding(linear.recipe.module, Verdict.REFUSED, fact, way_out, rule.reference)


def _fused(contract: Contract, linears: list[Linear]) -> Iterator[Finding]:
    known = {linear.recipe.module: linear for linear in linears}
    for rule in contract.fused:
        for module, linear in known.items():
            parent, _, name = module.rpartition(".")
            if name not in rule.members or linear.kind not in rule.kind:
                continue
            for sibling in rule.members[rule.members.index(name) + 1 :]:
                other = known.get(f"{parent}.{sibling}")
                if other is not None and not _alike(linear.recipe, other.recipe):
                    fact = f"{_says(linear.recipe)}, {sibling} has {_says(other.recipe)}; the engine fuses both into "
                    way_out = "Give them one scheme, calibrated on the same input."
                    yield Finding(module, Verdict.REFUSED, fact + rule.name, way_out, rule.reference)


def _sections(contract: Contract, linears: list[Linear]) -> Iterator[Finding]:
    """The first linear of each section that is not of the section's type."""
    for section in contract.sections:
        members = [linear for linear in linears if linear.section in section.kind]
        if section.float_beside:
            members = [linear for linear in members if linear.recipe.scheme.weight_bits is not None]
        for linear in members:
            schemes = linear.recipe.scheme, members[0].recipe.scheme
            if schemes[0] is not schemes[1] and not set(schemes) <= set(section.alike):
                first, named = members[0].recipe.module, " and ".join(section.kind)
                fact = f"{schemes[0]}, {first} has {schemes[1]}; {section.key} of config.json is one type for {named}"
                way_out = "Give them one scheme."
                yield Finding(linear.recipe.module, Verdict.REFUSED, fact, way_out, section.reference)
                break


def _alike(recipe: Recipe, other: Recipe) -> bool:
    same = (recipe.scheme, recipe.group_size) == (other.scheme, other.group_size)
    return same and recipe.activation == other.activation


def _says(recipe: Recipe) -> str:
    observed = recipe.activation
    span = f" over {observed.low:g} … {observed.high:g}" if observed is not None else ""
    return f"{recipe.scheme}{f' {recipe.group_size}' if recipe.group_size else ''}{span}"
