"""Layer comparison: which layers make the same calls. A log is cut at its layers, each part named relative to itself.

Two layers are the same if their modules have the same classes and their calls are the same: functions, modules, results
and arguments. A tensor argument is a result of the layer itself, the output of the layer before, the layer's own latent
cache or parameter, an input of the model, or a result of the calls before all layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from fxquant.tracing.calls import Call, Given, Held, Log, Made, Unknown

FIRST_PAST = 3
"""Flat inputs before the latent caches: input_ids, attention_mask, position_ids."""
HANDED_ON, OWN_PAST = "handed on", "own past"


class NotRepeatedError(Exception):
    """The reason why the graph of one layer does not represent those of others."""


@dataclass(frozen=True, slots=True)
class Before:
    """A tensor made before the first layer."""

    call: int
    index: int


@dataclass(frozen=True)
class Parts:
    """One log, cut at its layers.

    layers   each layer's calls, and the one result that the next part reads
    outputs  of the model: (layer, its result), or (None, a result of the calls before or after all layers)
    """

    before: tuple[Call, ...]
    layers: tuple[tuple[tuple[Call, ...], Made], ...]
    after: tuple[Call, ...]
    outputs: tuple[tuple[int | None, Any], ...]


@dataclass(frozen=True)
class Plan:
    """Which members of the module list at `path` to trace, and what the others are copies of.

    representatives  layers to trace, in order; layer 0 is always one, as no layer precedes it
    positions        layer → the position of its representative among them
    outputs          of the model: (layer or None, place among the outputs of a model of representatives)
    """

    path: str
    representatives: tuple[int, ...]
    positions: tuple[int, ...]
    outputs: tuple[tuple[int | None, int], ...] = ()


def plan_layers(layers: nn.ModuleList, path: str, parts: Sequence[Parts]) -> Plan:
    """Group layers that are the same in every run; raises NotRepeatedError if no two are."""
    positions, groups = [0], {}  # type: list[int], dict[Any, int]
    representatives = [0]
    for index in range(1, len(layers)):
        key = (tuple(run.layers[index] for run in parts), _makeup(layers[index]))
        if key not in groups:
            groups[key] = len(representatives)
            representatives.append(index)
        positions.append(groups[key])
    if len(representatives) == len(layers):
        raise NotRepeatedError("no two layers are the same")
    return Plan(path, tuple(representatives), tuple(positions))


def confirm(plan: Plan, full: Sequence[Parts], short: Sequence[Parts]) -> Plan:
    """`plan` with its outputs, if a model of its representatives ran exactly as the full model predicts."""
    for whole, part in zip(full, short, strict=True):
        expected = tuple(whole.layers[index] for index in plan.representatives)
        if (part.before, part.layers, part.after) != (whole.before, expected, whole.after):
            raise NotRepeatedError("with fewer layers the calls differ")
    places = {output: place for place, output in enumerate(short[0].outputs)}
    outputs = []
    for layer, produced in full[0].outputs:
        place = places.get((None if layer is None else plan.positions[layer], produced))
        if place is None:
            raise NotRepeatedError("equal layers give different outputs")
        outputs.append((layer, place))
    return replace(plan, outputs=tuple(outputs))


@contextmanager
def shortened(layers: nn.ModuleList, keep: Sequence[int]) -> Iterator[None]:
    """`layers` with the members `keep` only."""
    members = dict(layers._modules)
    layers._modules.clear()
    layers._modules.update({str(position): members[str(index)] for position, index in enumerate(keep)})
    try:
        yield
    finally:
        layers._modules.clear()
        layers._modules.update(members)


def _makeup(layer: nn.Module) -> tuple[Any, ...]:
    """Class and code of each module of a layer; a forward may be patched on the instance."""
    return tuple((path, type(module), _code(module)) for path, module in layer.named_modules(remove_duplicate=False))


def _code(module: nn.Module) -> Any:
    patched = vars(module).get("forward")
    return getattr(getattr(patched, "__func__", patched), "__code__", patched)


def split(log: Log, path: str, count: int) -> Parts:
    """Cut the log of a model whose `count` layers are the list at `path`; raises NotRepeatedError if it is not."""
    spans = [(start, stop) for _, start, stop in log.spans]
    if [layer for layer, *_ in log.spans] != [f"{path}.{index}" for index in range(count)]:
        raise NotRepeatedError("the layers do not run in order, once each")
    if any(stop != start for (_, stop), (start, _) in pairwise(spans)):
        raise NotRepeatedError("there are calls between layers")
    edges = [(0, spans[0][0]), *spans, (spans[-1][1], len(log.calls))]
    views = [_View(path, edges, place) for place in range(len(edges))]
    calls = [tuple(view.calls(log.calls)) for view in views]
    if any(len(view.handed_on) != 1 for view in views[2:]):
        raise NotRepeatedError("a layer passes on no tensor or several")
    handed_on = [next(iter(view.handed_on)) for view in views[2:]]
    layers = tuple(zip(calls[1:-1], handed_on, strict=True))
    return Parts(calls[0], layers, calls[-1], tuple(_output(reference, edges) for reference in log.outputs))


class _View:
    """Part `place` of a log, its tensors named relative to it: 0 before the layers, n layer n - 1, the last after."""

    def __init__(self, path: str, edges: list[tuple[int, int]], place: int) -> None:
        self.handed_on: set[Made] = set()
        self._edges, self._place, self._path = edges, place, path
        self._layer = place - 1 if 0 < place < len(edges) - 1 else None

    def calls(self, calls: list[Call]) -> Iterator[Call]:
        """The part's own calls, relative to it."""
        for call in calls[slice(*self._edges[self._place])]:
            yield Call(call.function, self._inside(call.module), self._value(call.arguments), call.results)

    def _value(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._value, value))
        if isinstance(value, Made):
            return self._shifted(value)
        if isinstance(value, Held):
            return replace(value, path=self._inside(value.path))
        if isinstance(value, Given) and value.index >= FIRST_PAST:
            if self._layer is None or value.index != FIRST_PAST + self._layer:
                raise NotRepeatedError("the cache of another layer is read")
            return OWN_PAST
        if isinstance(value, Unknown):
            raise NotRepeatedError("a constant tensor is read, or an argument is not a plain value")
        return value

    def _shifted(self, reference: Made) -> Any:
        start, stop = self._edges[self._place]
        if start <= reference.call < stop:
            return Made(reference.call - start, reference.index)
        if reference.call < self._edges[0][1]:
            return Before(reference.call, reference.index)
        start, stop = self._edges[self._place - 1]
        if not start <= reference.call < stop:
            raise NotRepeatedError("a layer reads a result of a layer before the previous one")
        self.handed_on.add(Made(reference.call - start, reference.index))
        return HANDED_ON

    def _inside(self, path: str) -> str:
        """A path relative to the part's own layer; paths outside of all layers are unchanged."""
        if not path.startswith(self._path + "."):
            return path
        index, _, rest = path.removeprefix(self._path + ".").partition(".")
        if self._layer is None or index != str(self._layer):
            raise NotRepeatedError("a part reads or runs a module of a layer that is not its own")
        return f".{rest}"


def _output(reference: Any, edges: list[tuple[int, int]]) -> tuple[int | None, Any]:
    if not isinstance(reference, Made):
        raise NotRepeatedError("an output is not the result of a call")
    place = next(place for place, (_, stop) in enumerate(edges) if reference.call < stop)
    inside = Made(reference.call - edges[place][0], reference.index)
    if place == 0:
        return None, Before(inside.call, inside.index)
    return (None if place == len(edges) - 1 else place - 1), inside
