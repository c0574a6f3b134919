"""SERVING.md: how to serve the output, computed from contract, model and ranks."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fxquant.engines.contract import Contract, Release, load_contract
from fxquant.engines.documents import group_size
from fxquant.engines.engine import Engine
from fxquant.engines.rank_layout import served_layout
from fxquant.engines.serving import Serving
from fxquant.engines.table import ENGINES, Target
from fxquant.lowering.ascend.writer import FILE
from fxquant.passes.check_contract import linears
from fxquant.policy.kinds import Kind
from fxquant.program.program import Program

SERVING = "SERVING.md"
GRAPH_ONLY = f"""# Serving

**No engine.** Written with `--graph-only`, target `{{target}}`, policy `{{policy}}`: nothing here was held against what
engines load. They run their own model code on the weights, which is another model if its graph was changed. In Python,
in this folder, with `{FILE}`:

```text
{{line}}
```
"""


def serving_of(program: Program, target: Target, tp: int | None, ep: int | None) -> Serving:
    """How to serve the rewritten `program`: on `tp` and `ep` ranks, or on as many as the contract takes."""
    contract, described = load_contract(target), linears(program)
    rule = contract.shared_expert_mix
    mixed = rule is not None and any(
        linear.kind is Kind.SHARED_EXPERT and linear.recipe.scheme is rule.needs for linear in described
    )
    layout = served_layout(contract, described, tp, ep)
    mtp = program.mtp
    quantized, float_draft = bool(program.recipes or mtp.recipes), mtp.stored and not mtp.recipes
    return Serving(layout=layout, quantized=quantized, mixed=mixed, float_draft=float_draft)


def serve_line(target: Target, serving: Serving | None, folder: str) -> str:
    """How to serve the output at `folder`, as one line; without `serving` how to load its own graph, in Python."""
    if serving is None:
        return f"{Path(FILE).stem}.Model.load({folder!r})"
    return ENGINES[target].serve(replace(serving, folder=folder))


def serving_page(program: Program, target: Target, policy: str, serving: Serving | None) -> str:
    """The page, for a reader in the output folder."""
    engine, contract = ENGINES[target], load_contract(target)
    if serving is None:
        return GRAPH_ONLY.format(target=target, policy=policy, line=serve_line(target, None, "."))
    rows = [*_rows(program, contract, serving), ("policy", policy)]
    lines = ["# Serving", "", f"Target `{target}`: {contract.title}.", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", f"{_where(engine)}:", "", "```text", engine.serve(serving), "```"]
    if engine.open_reader is not None:
        lines += ["", "Whether the files are right when they are read so, from this folder:", ""]
        lines += ["```sh", f"fxquant verify . {serving.layout.options}", "```"]
    return "\n".join(lines) + "\n"


def _where(engine: Engine) -> str:
    where = engine.where or "in a shell, in this folder"
    return where[0].upper() + where[1:]


def _rows(program: Program, contract: Contract, serving: Serving) -> Iterable[tuple[str, str]]:
    layout = serving.layout
    for release in contract.releases:
        yield "release", release_words(release)
    yield "tensor-parallel ranks", str(layout.tp)
    if layout.replicas > 1:
        yield "data-parallel copies", str(layout.replicas)
    split = "one rank has every expert" if layout.tp == 1 else f"{layout.tp} ranks split every expert"
    yield "expert-parallel ranks", f"{layout.ep}: experts are whole" if layout.ep > 1 else f"none: {split}"
    schemes = sorted({recipe.scheme.value for recipe in program.recipes.values()})
    yield "quantization", ", ".join(schemes) or "none"
    if any(recipe.int4 for recipe in program.recipes.values()):
        size = group_size(program)
        yield "int4 scales", f"two-level, groups of {size}" if size else "one per output channel"
    if contract.shared_expert_mix is not None:
        yield contract.shared_expert_mix.switch, "true" if serving.mixed else "false"
    yield "multi-token prediction layers", "in the folder" if program.mtp.stored else "none"


def release_words(release: Release) -> str:
    """An engine's releases, what they load, and what they do not, as contract and SERVING.md say it."""
    but = f", but not {release.but}" if release.but else ""
    return f"{release.engine} {release.span} loads {release.loads}{but}"
