"""Body of the emitted `Model.forward`: the functions in order, layers that differ only in their number as a loop."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from torch import fx

from fxquant.lowering.ascend.calls import INDENT, Call, assignment
from fxquant.lowering.ascend.emitter.functions import Emitted
from fxquant.lowering.ascend.emitter.structure import Input, base_name
from fxquant.passes.npu.page_latents import caches, is_paged
from fxquant.program.program import Program


@dataclass(frozen=True)
class Step:
    """One call. In a loop, its text has `layer` in place of its number."""

    target: str
    call: Call
    number: int | None = None


def forward_lines(program: Program, emitted: list[Emitted]) -> Iterator[str]:
    """Statements of `forward`, without indentation."""
    graph = program.graph.graph
    placeholders = graph.find_nodes(op="placeholder")
    results = program.graph.results
    names = _names(program, emitted, results)
    yield "w, dtype = self.weights, self.dtype"
    if any(given.hidden_keys for call in emitted for given in call.inputs):
        yield f"hidden_keys = find_hidden_keys({placeholders[1].name}, {placeholders[0].name}.shape[1])"
    if not is_paged(program):
        yield f"presents = [None] * {len(results) - 1}"
    yield from _fold([(_step(call, names, None), _step(call, names, _number(call))) for call in emitted])
    if is_paged(program):
        yield f"return {names[results[0]]}"
        return
    for index, node in enumerate(results[1:]):
        if names[node] != f"presents[{index}]":
            yield f"presents[{index}] = {names[node]}"
    yield f"return {names[results[0]]}, presents"


def _names(program: Program, emitted: list[Emitted], results: tuple[fx.Node, ...]) -> dict[fx.Node, str]:
    """Variable of every value between calls. A name is free again after the last call that reads it, so that calls of
    similar layers read the same, and `_fold` finds the loop."""
    names = {node: node.name for node in program.graph.graph.find_nodes(op="placeholder")}
    past = "pages" if is_paged(program) else "past"
    names |= {node: f"{past}[{index}]" for index, node in enumerate(caches(program))}
    last = {node: step for step, call in enumerate(emitted) for node in call.segment.inputs}
    last |= dict.fromkeys(results, len(emitted))
    live: dict[str, int] = {}
    for step, call in enumerate(emitted):
        for node in call.segment.outputs:
            if node in results[1:]:
                names[node] = f"presents[{results.index(node, 1) - 1}]"
                continue
            base = "logits" if node is results[0] else base_name(node)
            name, count = base, 1
            while live.get(name, -1) > step:
                count += 1
                name = f"{base}_{count}"
            names[node], live[name] = name, last[node]
    return names


def _number(call: Emitted) -> int:
    """Number of the layer; -1 outside layers."""
    path = call.segment.prefix.rstrip(".")
    return int(path.rpartition(".")[2]) if path and call.segment.key == path else -1


def _step(call: Emitted, names: dict[fx.Node, str], number: int | None) -> Step:
    """The call unchanged, or with `layer` in place of `number`."""

    def text(name: str) -> str:
        return name.replace(f"[{number}]", "[layer]")

    def argument(given: Input) -> str:
        return "hidden_keys" if given.hidden_keys else text(names[given.node])

    targets = [text(names[node]) for node in call.segment.outputs]
    path = call.segment.key.removesuffix(f".{number}")
    key = f'w["{call.segment.key}"]' if number in (None, -1) else f'w[f"{path}.{{layer}}"]'
    arguments = (key, "dtype", *(argument(given) for given in call.inputs))
    return Step(", ".join(targets), Call(call.function.name, arguments), number)


def _fold(steps: list[tuple[Step, Step]]) -> Iterator[str]:
    """Source of the calls; two or more neighbours that read the same and count up become a loop."""

    def kind(item: tuple[int, tuple[Step, Step]]) -> tuple:
        position, (_, step) = item
        return step.target, step.call, position - (step.number or 0)

    for _, group in groupby(enumerate(steps), kind):
        run = [pair for _, pair in group]
        plain, step = run[0]
        if len(run) == 1 or step.number is None or step.number < 0:
            for head, _ in run:
                yield from assignment(head.target, head.call, depth=2)
        else:
            yield f"for layer in range({step.number}, {step.number + len(run)}):"
            yield from (INDENT + line for line in assignment(step.target, step.call, depth=3))
