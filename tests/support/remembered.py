"""Functions of the product that depend on their arguments alone, with a memory: hundreds of tests compile alike.

What is remembered was computed in the same process from equal arguments. Commands see it; a test that calls one of
these functions by its own name does not.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny import float_program
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.frontend import source
from fxquant.lowering import output
from fxquant.lowering.ascend import writer
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.schemes.schemes import Recipe
from fxquant.storage.hashing import hash_bytes
from fxquant.verification import ascend_statements, graph_checks, weight_checks

MOST, LARGEST = 400, 1 << 16
"""Results of a function that are kept; numbers of a weight whose codes are."""


@contextmanager
def traced_once() -> Iterator[None]:
    """`open_source` of a folder gives a copy of the program that was traced first for the same config."""

    def trace(model: nn.Module, opened: Checkpoint) -> Program:
        return float_program(opened)

    with patch.object(source, "trace", trace):
        yield


@contextmanager
def computed_once() -> Iterator[None]:
    """A graph fused and its text, where they are written and once more where they are checked; a weight's codes by the
    reference."""
    with (
        patch.object(writer, "deployment", remembering(writer.deployment, dump_program, copy.deepcopy)),
        patch.object(graph_checks, "deployment", remembering(graph_checks.deployment, dump_program, copy.deepcopy)),
        patch.object(writer, "ascend_code", remembering(writer.ascend_code, dump_program)),
        patch.object(
            ascend_statements,
            "module_code",
            remembering(ascend_statements.module_code, lambda program, emitted: dump_program(program)),
        ),
        patch.object(weight_checks, "expected_codes", remembering(weight_checks.expected_codes, codes_key)),
    ):
        yield


@contextmanager
def exported_once() -> Iterator[None]:
    """The .pt2 files of equal graphs, whose bytes follow from the graph (test_exported.py): written each time."""
    known: dict[str, dict[str, bytes]] = {}

    def write(program: Program, folder: Path) -> None:
        key = dump_program(program)
        if key not in known:
            known[key] = {file.name: file.read_bytes() for file in write_exported(program, folder)}
            return
        for name, data in known[key].items():
            (folder / name).write_bytes(data)

    with patch.object(output, "write_exported", write):
        yield


def remembering(
    function: Callable[..., Any], key: Callable[..., Any], given: Callable[[Any], Any] = lambda result: result
) -> Callable[..., Any]:
    """`function`, called once for arguments of one `key` among the last `MOST`, each time where that is None.

    `given`: what a caller gets of a result, a copy where it may change it.
    """
    known: dict[Any, Any] = {}

    @wraps(function)
    def call(*arguments: Any) -> Any:
        digest = key(*arguments)
        if digest is None:
            return function(*arguments)
        known[digest] = result = known.pop(digest) if digest in known else function(*arguments)
        if len(known) > MOST:
            del known[next(iter(known))]
        return given(result)

    return call


def codes_key(recipe: Recipe, weight: Tensor) -> tuple[Any, ...] | None:
    """All that `expected_codes` reads."""
    if weight.numel() > LARGEST:
        return None
    made_by = (recipe.algorithm, recipe.scheme.weight_bits, recipe.group_size, recipe.scale_dtype)
    data = hash_bytes(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return (*made_by, weight.dtype, tuple(weight.shape), data)
