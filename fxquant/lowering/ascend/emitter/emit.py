"""Emitter of `model_ascend.py`: program → the text of a plain torch module that calls the operators of torch_npu."""

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from types import ModuleType

import torch

from fxquant.lowering.ascend.cached_graphs import cached_graphs
from fxquant.lowering.ascend.calls import INDENT, broken
from fxquant.lowering.ascend.emitted import cache, composites, norm_composites, norm_layouts, weight_loading
from fxquant.lowering.ascend.emitter.cached_text import model_methods
from fxquant.lowering.ascend.emitter.forward import forward_lines
from fxquant.lowering.ascend.emitter.functions import (
    Emitted,
    Function,
    Weights,
    code,
    functions,
    own_names,
    scheme_text,
)
from fxquant.lowering.ascend.emitter.structure import Segment, unique
from fxquant.program.program import Program

IMPORTS = """\
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

try:
    import torch_npu  # noqa: F401
except ModuleNotFoundError:
    from fxquant.lowering.ascend.operators import register

    register()
"""

PAGES = "Pages = tuple[Tensor, Tensor]\n"

LOADER = ("WeightFiles", "Stored", "load_stored", "load_table")

MODEL = '''\
class Model:
    """Weights in the layout of the operators; `forward` over growing latents, `prefill` and `decode` over a `Cache`."""

    def __init__(self, weights: dict[str, dict[str, Tensor]], dtype: torch.dtype) -> None:
        self.weights, self.dtype = weights, dtype

    @classmethod
    def load(cls, folder: Path | str, dtype: torch.dtype = {dtype}, device: str = "cpu") -> "Model":
        """Read the weight files of `folder`, tensor by tensor. A float32 model serves comparisons on CPU."""
        read = WeightFiles(Path(folder))
        blocks = BLOCKS.items()
        return cls({{key: load_table(read, table, prefix, dtype, device) for key, (prefix, table) in blocks}}, dtype)

    def empty_past(self, batch: int, device: str = "cpu") -> list[Tensor]:
        """`past` for the first call."""
        return [torch.zeros(batch, 0, width, dtype=self.dtype, device=device) for width in {widths}]

    @torch.no_grad()
    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """input_ids, position_ids int64 [B, S]; attention_mask int64 [B, T], 0 on padding; past: one latent
        [B, T - S, width] per layer -> logits [B, S, vocabulary] and the grown latents."""
{body}

    __call__ = forward

{cached}'''


def ascend_code(program: Program) -> str:
    """The text of the module: same program, same text."""
    return module_code(program, functions(program))


def module_code(program: Program, emitted: list[Emitted]) -> str:
    """The text of the module for existing functions."""
    prefill, decode = cached_graphs(program, emitted)
    every = [*emitted, *prefill.emitted, *decode.emitted]
    tables = _tables(every)
    distinct = list(dict.fromkeys(call.function for call in every))
    used = set().union(*(function.used for function in distinct))
    used |= {"find_hidden_keys"} if any(i.hidden_keys for call in every for i in call.inputs) else set()
    glue = _code_of(composites, used) + _code_of(norm_composites, used)
    blocks = [code(function, _places(function, every)) for function in distinct]
    graph = "\n\n".join([*glue, *blocks])
    parts = [
        f'"""{_docstring(program, every, graph)}"""\n\n{IMPORTS}'.rstrip() + "\n",
        graph,
        *_code_of(weight_loading, used | set(LOADER)),
        *_code_of(norm_layouts, used),
        PAGES,
        *_code_of(cache, set(own_names(cache))),
        "\n".join(_table_text(table) for table in dict.fromkeys(tables.values())),
        _blocks(every, tables),
        _model(program, emitted, model_methods(prefill, decode)),
    ]
    return "\n\n".join(parts)


def _code_of(module: ModuleType, names: set[str]) -> list[str]:
    """Source of the functions and classes `names` of `module`, and of the functions that they call, in its order."""
    own = own_names(module)
    needed: set[str] = set()
    frontier = names & own.keys()
    while frontier:
        needed |= frontier
        called = {name for wanting in frontier for name in getattr(own[wanting], "__code__", _NO_CODE).co_names}
        frontier = (called & own.keys()) - needed
    return [inspect.getsource(value) for name, value in own.items() if name in needed]


_NO_CODE = (lambda: None).__code__
"""In place of a class's `__code__`, which does not exist."""


def _places(function: Function, emitted: list[Emitted]) -> str:
    """Docstring of a function: where in the model it is called."""
    keys = [call.segment.key for call in emitted if call.function is function]
    prefixed = [call for call in emitted if call.function is function and call.segment.prefix]
    if not prefixed:
        return f"Operators {keys[0].partition('_')[0]} the layers."
    return f"{keys[0]}." if len(keys) == 1 else f"{len(keys)} layers, {keys[0]} to {keys[-1]}."


@dataclass(frozen=True)
class Table:
    """The weights of a block, for the functions of all graphs."""

    name: str
    entries: Weights


def _tables(calls: list[Emitted]) -> dict[str, Table]:
    """Segment key → its table; the function of a later graph also has the entries of earlier graphs."""
    names: dict[str, str] = {}
    for call in calls:
        names.setdefault(call.segment.key, f"{call.function.name.upper()}_WEIGHTS")
    entries = {call.segment.key: call.function.weights for call in calls}
    taken: set[str] = set()
    tables: dict[tuple[str, Weights], Table] = {}
    for key, name in names.items():
        if (name, entries[key]) not in tables:
            tables[name, entries[key]] = Table(unique(name, taken), entries[key])
    return {key: tables[name, entries[key]] for key, name in names.items()}


def _table_text(table: Table) -> str:
    entries = [INDENT + line for key, entry in table.entries for line in broken(f'"{key}": ', entry, ",", 1)]
    return "\n".join([f"{table.name} = {{", *entries, "}", ""])


def _blocks(calls: list[Emitted], tables: dict[str, Table]) -> str:
    """`BLOCKS`: key → prefix of the stored names, and weight table. Layers with consecutive numbers share a line."""

    def numbered(item: tuple[int, Segment]) -> tuple:
        position, segment = item
        path, _, number = segment.key.rpartition(".")
        place = (path, position - int(number)) if number.isdigit() and segment.prefix else (segment.key, 0)
        return tables[segment.key].name, place

    lines = []
    segments = {call.segment.key: call.segment for call in reversed(calls)}  # the first graph's segment wins
    ordered = [segments[key] for key in tables]
    for (table, (path, _)), group in groupby(enumerate(ordered), numbered):
        run = [segment for _, segment in group]
        key = run[0].key
        if len(run) == 1:
            lines.append(f'"{key}": ("{run[0].prefix}", {table}),')
        else:
            first, layer = int(key.rpartition(".")[2]), f"{path}.{{layer}}"
            span = f"range({first}, {first + len(run)})"
            lines.append(f'**{{f"{layer}": (f"{layer}.", {table}) for layer in {span}}},')
    return "\n".join(["BLOCKS = {", *(INDENT + line for line in lines), "}", ""])


def _model(program: Program, emitted: list[Emitted], cached: str) -> str:
    body = "\n".join(2 * INDENT + line for line in forward_lines(program, emitted))
    caches = [node.meta["val"].shape[-1] for node in program.graph.graph.find_nodes(op="placeholder")[3:]]
    widths = f"[{caches[0]}] * {len(caches)}" if len(set(caches)) == 1 else repr(caches)
    dtype = torch.bfloat16 if program.dtype is torch.float32 else program.dtype
    return MODEL.format(dtype=dtype, widths=widths, body=body, cached=cached)


def _docstring(program: Program, emitted: list[Emitted], graph: str) -> str:
    config = program.config
    name = (config.get("architectures") or [config.get("model_type", "a model")])[0]
    layers = len({call.segment.key for call in emitted if call.segment.prefix})
    dtype = str(program.dtype).removeprefix("torch.")
    lines = [f"{name} for Ascend NPUs: {layers} layers, {dtype}. Emitted by fxquant from the quantized graph.", ""]
    lines += ["Policy, and how many modules each rule decides:"]
    rules = Counter(str(rule) for rule in program.rules.values())
    lines += [f"{INDENT}{count:6}  {rule}" for rule, count in rules.items()]
    lines += ["", "Linears of each scheme, one per expert:"]
    schemes = Counter(scheme_text(recipe) for recipe in program.recipes.values() for _ in recipe.modules)
    lines += [f"{INDENT}{count:6}  {scheme}" for scheme, count in schemes.items()] or [f"{INDENT}none, all are float"]
    lines += ["", "Functions, each for all layers of its structure:"]
    count_of = Counter(name for name, _ in dict.fromkeys((call.function.name, call.segment.key) for call in emitted))
    lines += [f"{INDENT}{count:6}  {function}" for function, count in count_of.items()]
    operators = sorted({word.split("(")[0] for word in graph.split("torch.ops.npu.")[1:]})
    lines += ["", "Engine operators:", *(f"{INDENT}{operator}" for operator in operators)]
    lines += ["", "Use:", f"{INDENT}model = Model.load(folder)"]
    lines += [f"{INDENT}logits, past = model(input_ids, attention_mask, position_ids, model.empty_past(batch))"]
    lines += [f"{INDENT}cache = model.paged_cache(sequences, num_blocks)"]
    lines += [f"{INDENT}logits = model.prefill(input_ids, position_ids, cache), then model.decode, token by token"]
    lines += ["", "Functions take w, a block's tensors by name, and dtype, that of floats between operators."]
    return re.sub(r"[^ -~\n→…]|[\"\\]", "?", "\n".join([*lines, ""]))  # no name may end the docstring
