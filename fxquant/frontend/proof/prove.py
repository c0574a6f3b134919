"""Proof of a traced model: see the package."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.config import DeepseekV3Config
from fxquant.errors import FxquantError
from fxquant.frontend.adapt import adapted
from fxquant.frontend.assemble import fetch
from fxquant.frontend.families import family_of
from fxquant.frontend.proof.copies import deep_config, fill, named_tensors, numbers, tokens, wide_config
from fxquant.frontend.proof.eager import eager_logits, layer_outputs
from fxquant.frontend.proof.layers import first_difference
from fxquant.frontend.proof.logits import compare_logits
from fxquant.frontend.proof.rotary import compare_rotary
from fxquant.frontend.proof.traced import traced_logits
from fxquant.frontend.recognition.published import nonnegative_bias
from fxquant.frontend.user_file import UserFile, where
from fxquant.program.program import Program
from fxquant.tracing import trace

Build = Callable[[DeepseekV3Config, str], nn.Module]
PARAMETERS = 1 << 26
"""Maximum parameters of a model that is run although it ignores the config it is given."""
SHORT, STEPS, TAIL = 24, 3, 0.7
EDITED = (
    "A class computes something else under export: keep control flow free of sizes and values, or declare it in LEAVES."
)


@torch.no_grad()
def prove(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    """Hold the graph against the file's own forward; returns what was compared, or "" if it could not be run.

    A model that takes no config is run if it is small. A large one is refused, unless its classes are those of the
    installed transformers: then it is not checked. Raises FxquantError where the two differ, with the first layer.
    """
    with one_thread():
        return _proven(file, config, build)


def _proven(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    wide = traced_copy(file, wide_config(config) if file.takes_config else config, build)
    if wide is None:
        return ""
    program, tensors, model, own = wide
    short = tokens(own.vocab_size, (7, 4), STEPS)
    compare_rotary(file, model, own)
    compare_logits(file, model, _eager(file, model, short), traced_logits(program, tensors, short), own)
    if not file.takes_config:
        return "logits"
    return _deep(file, config, build)


@contextmanager
def one_thread() -> Iterator[None]:
    """The copies' matrices are small: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _deep(file: UserFile, config: DeepseekV3Config, build: Build) -> str:
    deep = traced_copy(file, deep_config(config), build, TAIL)
    assert deep is not None
    program, tensors, model, own = deep
    longest = max([SHORT, *(number + 9 for number in numbers(model))])
    longest = min(longest, own.max_position_embeddings - STEPS)
    given = tokens(own.vocab_size, (longest, longest - 7), STEPS)
    family = family_of(model)
    layers = fetch(model, family.parts["layers"] if family else "model.layers")
    with layer_outputs(layers, 1 + STEPS) as expected:
        _eager(file, model, given)
    for chunks in ((), (longest // 3, longest - 2)):
        found = first_difference(program, tensors, given, expected, chunks)
        if found is not None:
            index, error = found
            fact = (
                f"on a narrow copy of {longest} tokens the traced graph gives other hidden states than the file's own "
            )
            fact += f"forward, by {error:.2g} of them" + (", the prompt in chunks." if chunks else ".")
            raise FxquantError(f"{file.path}: layer {index} ({type(layers[index]).__name__})", fact, EDITED)
    return f"{len(layers)} layers, {longest} tokens, {STEPS} steps"


def traced_copy(
    file: UserFile, config: DeepseekV3Config, build: Build, tail: float = 0.0
) -> tuple[Program, dict[str, Tensor], nn.Module, DeepseekV3Config] | None:
    """The graph of a copy, its weights by name, and the copy itself; None: too large, and as transformers has it."""
    meta = build(config, "meta")  # its size must be known before it takes memory
    if sum(tensor.numel() for tensor in meta.parameters()) > PARAMETERS:
        if type(meta).__module__.startswith("transformers."):
            return None
        fact = f"its {type(meta).__name__} cannot be checked: build_model does not take its sizes from config."
        raise FxquantError(file.path, fact, "Use config, so that a small copy can be compared with the graph.")
    with adapted(meta, config, file.leaves) as root:
        program = trace(root, Checkpoint(Path("proof"), config.model_dump() | {"torch_dtype": "float32"}, {}))
    model = build(config, "cpu").float()
    fill(model, tail)
    nonnegative = nonnegative_bias(model) is not None
    with adapted(model, config, file.leaves) as root:
        tensors = dict(named_tensors(root, nonnegative))
    return program, tensors, model, config


def _eager(file: UserFile, model: nn.Module, given: object) -> Tensor:
    try:
        return eager_logits(model, family_of(model), given)  # type: ignore[arg-type]
    except Exception as error:
        fact = f"the forward of {type(model).__name__} fails on a small copy: {where(error, file.path)}"
        raise FxquantError(
            file.path, fact, "It must run on CPU, with a cache, at any sizes given by config."
        ) from error
