"""Proof of a traced model: see the package."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import torch
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adapt import adapted
from fxquant.frontend.assemble import fetch
from fxquant.frontend.families import family_of
from fxquant.frontend.proof.copies import (
    Tokens,
    deep_config,
    every_expert,
    fill,
    named_tensors,
    numbers,
    tokens,
    wide_config,
)
from fxquant.frontend.proof.eager import eager_logits, layer_outputs
from fxquant.frontend.proof.layers import Expected, compare_layers, complete
from fxquant.frontend.proof.logits import compare_logits
from fxquant.frontend.proof.rotary import compare_rotary
from fxquant.frontend.proof.traced import traced_logits
from fxquant.frontend.recognition.published import nonnegative_bias
from fxquant.frontend.user_file import UserFile
from fxquant.frontend.user_module import where
from fxquant.program.program import Program
from fxquant.tracing import trace
from fxquant.tracing.calls import outermost_lists

Build = Callable[[DeepseekV3Config, str], nn.Module]
PARAMETERS = 1 << 26
"""Maximum parameters of a model that is run although it ignores the config it is given."""
SHORT, STEPS, TAIL = 24, 3, 0.7
EDITED = "Keep control flow free of sizes and values, and let a class in LEAVES compute what its adapter says."


class CopyError(FxquantError):
    """A copy cannot be traced; if the model itself can, sizes are written into its code."""


@dataclass(frozen=True)
class Copy:
    """A model with random weights: its graph, the weights by name, itself, and its config."""

    program: Program
    tensors: dict[str, Tensor]
    model: nn.Module
    config: DeepseekV3Config


@torch.no_grad()
def prove(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    """Hold the graph against the file's own forward; returns what was compared, or "" if it could not be run.

    A model that takes no config is run if it is small. A large one is refused, unless nothing in it is replaced or its
    classes are those of the installed transformers: then it is not checked. Raises FxquantError where the two differ,
    with the first layer.
    """
    with one_thread():
        return _proven(file, config, build)


def _proven(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    compared = _wide(file, wide_config(config) if file.takes_config else config, build)
    return ", ".join([compared, *_deep(file, config, build)]) if compared and file.takes_config else compared


def _wide(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    wide = traced_copy(file, config, build)
    if wide is None:
        return ""
    compare_rotary(file, wide.model, wide.config)
    if file.takes_config:
        longest = every_expert(wide.config)
        given, chunks = tokens(wide.config.vocab_size, (longest,), STEPS), (longest // 3, 2 * longest // 3)
        _hold(file, wide, given, (chunks,), f"a copy of two layers and all experts, {longest} tokens,")
    return _logits(file, wide)


def _logits(file: UserFile, copy: Copy) -> str:
    """Those of a short prompt and some steps."""
    short = tokens(copy.config.vocab_size, (7, 4), STEPS)
    logits = traced_logits(copy.program, copy.tensors, short)
    compare_logits(file, copy.model, _eager(file, copy.model, short), logits, copy.config)
    return f"logits of {copy.config.num_hidden_layers} layers, {short.lengths[0]} tokens"


@contextmanager
def one_thread() -> Iterator[None]:
    """The copies' matrices are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deep(file: UserFile, config: DeepseekV3Config, build: Build) -> list[str]:
    deep = traced_copy(file, deep_config(config), build, TAIL)
    if deep is None:
        return []
    compare_rotary(file, deep.model, deep.config)  # of every layer that has one
    longest = max([SHORT, *(number + 9 for number in numbers(deep.model))])
    longest = min(longest, deep.config.max_position_embeddings - STEPS)
    given = tokens(deep.config.vocab_size, (longest, longest - 7), STEPS)
    held = _hold(file, deep, given, ((), (longest // 3, longest - 2)), f"a narrow copy of {longest} tokens")
    return held and [f"{held[0]}, {longest} tokens, {STEPS} steps"]


def _hold(file: UserFile, copy: Copy, given: Tokens, cuts: Sequence[Sequence[int]], what: str) -> list[str]:
    """Every layer of the graph against the file's own, the prompt cut at each of `cuts`; what was compared, if any."""
    stack = _layers(copy.model, copy.config)
    if stack is None:
        return []
    path, layers = stack
    with layer_outputs(layers, 1 + STEPS) as seen:
        logits = _eager(file, copy.model, given)
    expected = Expected(path, {index: rows for index, rows in enumerate(seen) if complete(rows, given)}, logits)
    compared: set[int] = set()
    for chunks in cuts:
        found = compare_layers(copy.program, copy.tensors, given, expected, chunks)
        compared = set(found.compared)
        if found.error is not None:
            amount = f"by {found.error:.2g} of them" if isfinite(found.error) else "one of them not finite"
            fact = f"on {what} the traced graph gives other {found.what} than the file's own forward, {amount}"
            fact += ", the prompt in chunks." if chunks and len(cuts) > 1 else "."
            raise FxquantError(f"{file.path}: {_place(found.layer, layers)}", fact, EDITED)
    return [f"{len(compared)} of {len(layers)} layers"]


def _place(index: int | None, layers: nn.ModuleList) -> str:
    return "after the layers" if index is None else f"layer {index} ({type(layers[index]).__name__})"


def _layers(model: nn.Module, config: DeepseekV3Config) -> tuple[str, nn.ModuleList] | None:
    """Where the graph has the layers, and the model's own; None: a model that keeps them in no single list."""
    family = family_of(model)
    if family is not None:
        return "model.layers", fetch(model, family.parts["layers"])
    lists = [(path, held) for path, held in outermost_lists(model).items() if len(held) == config.num_hidden_layers]
    return lists[0] if len(lists) == 1 else None


def traced_copy(file: UserFile, config: DeepseekV3Config, build: Build, tail: float = 0.0) -> Copy | None:
    """A copy and its graph; None for one that cannot be run: too large and as transformers or fxquant.models has it, or
    traced with inputs that its file declares."""
    meta = build(config, "meta")  # its size must be known before it takes memory
    plain = family_of(meta) is None and not file.leaves
    if plain and file.example_inputs is not None:
        return None
    if sum(tensor.numel() for tensor in meta.parameters()) > PARAMETERS:
        if plain or type(meta).__module__.startswith("transformers."):
            return None
        fact = f"its {type(meta).__name__} cannot be checked: build_model does not take its sizes from config."
        raise FxquantError(file.path, fact, "Use config, so that a small copy can be compared with the graph.")
    try:
        with adapted(meta, config, file.leaves) as root:
            document = config.model_dump() | {"torch_dtype": "float32"}
            program = trace(root, Checkpoint(Path("proof"), document, {}))
    except FxquantError as error:
        raise CopyError(error.place, error.fact, error.remedy) from error
    del meta, root
    model = build(config, "cpu").float()
    fill(model, tail)
    nonnegative = nonnegative_bias(model) is not None
    with adapted(model, config, file.leaves) as root:
        tensors = dict(named_tensors(root, nonnegative))
    family = family_of(model)  # a model may take its sizes from elsewhere
    return Copy(program, tensors, model, family.config(model, config) if family else config)


def _eager(file: UserFile, model: nn.Module, given: object) -> Tensor:
    try:
        return eager_logits(model, family_of(model), given)  # type: ignore[arg-type]
    except Exception as error:
        fact = f"the forward of {type(model).__name__} fails on a small copy: {where(error, file.path)}"
        raise FxquantError(
            file.path, fact, "It must run on CPU, with a cache, at any sizes given by config."
        ) from error
