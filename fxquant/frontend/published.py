"""Published graph: the family's own graph for a config, and where a float program leaves it."""

import json
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path

import torch

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import parse_config
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.models import DeepseekV3
from fxquant.program.program import Program
from fxquant.program.structural_hash import Line, structure
from fxquant.tracing import trace


def difference(program: Program) -> tuple[str, str] | None:
    """The first layer of a float program that is not as the published model has it, and how; None: all are.

    Engines run that model's graph with their own code, whatever graph the weights were compiled with.
    """
    pairs = zip_longest(structure(program), _published(json.dumps(program.config, sort_keys=True)))
    return next((_said(own, theirs) for own, theirs in pairs if own is None or theirs is None or own != theirs), None)


def refuse_changed(program: Program, target: Target) -> None:
    """Raise FxquantError, with the layer that differs, unless the float `program` is the published model's."""
    found = difference(program)
    if found is not None:
        layer, how = found
        fact = f"{how}; target {target} runs the published graph with its own code, so the change would be lost."
        others = " or ".join(other for other, engine in ENGINES.items() if not engine.model_code)
        way_out = f"Pass --graph-only, for the graph beside the weights alone, or --target {others}, which runs it."
        raise FxquantError(f"layer {layer}" if layer else "the model's graph", fact, way_out)


def published_program(config: str, place: Path) -> Program:
    """The float program of a config.json's text; no weights are needed."""
    document = json.loads(config)
    with torch.device("meta"):
        module = DeepseekV3(parse_config(document, place))
    return trace(module, Checkpoint(place, document, {}))


@lru_cache(maxsize=1)
def _published(config: str) -> tuple[Line, ...]:
    return tuple(structure(published_program(config, Path("config.json"))))


def _said(own: Line | None, theirs: Line | None) -> tuple[str, str]:
    if own is None or theirs is None:
        longer = own or theirs
        assert longer is not None
        whose = "this graph" if theirs is None else "the published graph"
        return longer.module, f"{longer.operator} is in {whose} only"
    place = own.module or theirs.module
    if own.operator != theirs.operator:
        where = f" in {theirs.module}" if theirs.module not in ("", place) else ""
        return place, f"it calls {own.operator} where the published graph has {theirs.operator}{where}"
    return place, f"it calls {own.operator} on other values or parameters than the published graph"
