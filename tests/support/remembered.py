"""Functions of the product that depend on their arguments alone, with a memory: hundreds of tests compile alike.

What is remembered was computed from equal arguments, in the same process or, where it is `Kept`, in any of the run.
Commands see it; a test that calls one of these functions by its own name does not.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from kept import Kept
from tiny import float_program
from torch import Tensor, nn

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.engines.onnx_form import OnnxForm
from fxquant.frontend import published, source
from fxquant.lowering import output
from fxquant.lowering.ascend import writer
from fxquant.lowering.ascend.export.exported import write_exported
from fxquant.lowering.onnx import writer as onnx_writer
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.program.shape_inference import ShapeRules
from fxquant.schemes.schemes import Recipe, WeightAlgorithm
from fxquant.storage.hashing import hash_bytes
from fxquant.verification import ascend_statements, graph_checks, module_check

MOST, LARGEST = 400, 1 << 16
"""Results of a function that are remembered; numbers of a weight whose codes are."""

MOST_SHAPES = 1 << 13


@contextmanager
def traced_once() -> Iterator[None]:
    """A folder's program, and the published one of a config, are copies of what was traced first for this config."""

    def trace(model: nn.Module, opened: Checkpoint) -> Program:
        return float_program(opened)

    with patch.object(source, "trace", trace), patch.object(published, "trace", trace):
        yield


@contextmanager
def emitted_once() -> Iterator[None]:
    """A graph fused and its text, where they are written and once more where they are checked."""
    onnx = remembering(onnx_writer.deployment, deployed_for, copy.deepcopy)
    with (
        patch.object(onnx_writer, "deployment", onnx),
        patch.object(graph_checks, "onnx_deployment", onnx),
        patch.object(writer, "deployment", remembering(writer.deployment, dump_program, copy.deepcopy)),
        patch.object(graph_checks, "deployment", remembering(graph_checks.deployment, dump_program, copy.deepcopy)),
        patch.object(writer, "ascend_code", remembering(writer.ascend_code, dump_program)),
        patch.object(
            ascend_statements,
            "module_code",
            remembering(ascend_statements.module_code, lambda program, emitted: dump_program(program)),
        ),
    ):
        yield


@contextmanager
def shapes_once() -> Iterator[None]:
    """What an operator gives for values of one trace, which all copies of a traced program share."""

    def computed(rules: ShapeRules, target: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, original(rules, target, args, kwargs)  # the key has the id of a trace: as long as it is known

    def key(rules: ShapeRules, target: Any, args: Any, kwargs: Any) -> Any:
        return (target, rules._signature(args), rules._signature(kwargs)) if type(rules) is ShapeRules else None

    original = ShapeRules.compute
    with patch.object(ShapeRules, "compute", remembering(computed, key, lambda kept: kept[1], MOST_SHAPES)):
        yield


@contextmanager
def codes_once(kept: Kept) -> Iterator[None]:
    """A weight's codes by the reference; those that it searches, which takes long, are kept for all processes."""
    original = module_check.expected_codes
    remembered = remembering(original, codes_key)

    def codes(recipe: Recipe, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if recipe.algorithm.scales is WeightAlgorithm.MIN_MAX:
            return remembered(recipe, weight)

        def small() -> tuple[Tensor, Tensor, Tensor]:
            found, scales, seconds = original(recipe, weight)
            return found.to(torch.int8), scales, seconds

        found, scales, seconds = kept.get(repr(arguments(recipe, weight)), small)
        return found.float(), scales, seconds

    with patch.object(module_check, "expected_codes", codes):
        yield


@contextmanager
def computed_once(kept: Kept) -> Iterator[None]:
    """Shapes and texts of graphs, and codes."""
    with shapes_once(), emitted_once(), codes_once(kept):
        yield


@contextmanager
def exported_once(kept: Kept) -> Iterator[None]:
    """The .pt2 files of equal graphs, whose bytes follow from the graph (test_exported.py): written each time."""

    def write(program: Program, folder: Path) -> None:
        def made() -> dict[str, bytes]:
            return {file.name: file.read_bytes() for file in write_exported(program, folder)}

        for name, data in kept.get(dump_program(program), made).items():
            (folder / name).write_bytes(data)

    with patch.object(output, "write_exported", write):
        yield


def remembering(
    function: Callable[..., Any],
    key: Callable[..., Any],
    given: Callable[[Any], Any] = lambda result: result,
    most: int = MOST,
) -> Callable[..., Any]:
    """`function`, called once for arguments of one `key` among the last `most`, each time where that is None.

    `given`: what a caller gets of a result, a copy where it may change it.
    """
    known: dict[Any, Any] = {}

    @wraps(function)
    def call(*arguments: Any) -> Any:
        digest = key(*arguments)
        if digest is None:
            return given(function(*arguments))
        known[digest] = result = known.pop(digest) if digest in known else function(*arguments)
        if len(known) > most:
            del known[next(iter(known))]
        return given(result)

    return call


def deployed_for(program: Program, form: OnnxForm) -> tuple[str, OnnxForm]:
    """All that the deployment of an ONNX graph follows from."""
    return dump_program(program), form


def codes_key(recipe: Recipe, weight: Tensor) -> tuple[Any, ...] | None:
    """All that `expected_codes` reads, of a weight whose codes are remembered."""
    return arguments(recipe, weight) if weight.numel() <= LARGEST else None


def arguments(recipe: Recipe, weight: Tensor) -> tuple[Any, ...]:
    """All that `expected_codes` reads."""
    made_by = (recipe.algorithm.scales, recipe.scheme.weight_bits, recipe.group_size, recipe.scale_dtype)
    data = hash_bytes(weight.contiguous().view(torch.uint8).numpy().tobytes())
    return (*made_by, weight.dtype, tuple(weight.shape), data)
