"""Ascend statement check: every statement of an emitted block, run alone on the graph's own values.

Each statement gets all its inputs from the graph, so an error shows only where it arises, and a rounding that flips a
choice of experts cannot spread.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx

from fxquant.errors import FxquantError
from fxquant.lowering.ascend.emitter.emit import module_code
from fxquant.lowering.ascend.emitter.functions import Emitted, functions
from fxquant.lowering.ascend.emitter.structure import is_attention_mask
from fxquant.lowering.ascend.emitter.values import to_engine
from fxquant.lowering.ascend.writer import FILE
from fxquant.program.node_names import operator_name
from fxquant.program.operands import item_of, operand_node
from fxquant.program.program import Program
from fxquant.verification.ascend_bounds import error_bound
from fxquant.verification.emitted_weights import EmittedWeights

Weights = Mapping[str, Mapping[str, Tensor]]
"""Key of a block in the emitted BLOCKS → its tensors by name, as in `Model.weights`."""


@dataclass(frozen=True)
class StatementCheck:
    """One assigned variable. `error` and `bound` are the largest of the tensor; `ok` holds for each element.

    For integers and booleans the bound is 0, except for codes whose floats are within their own error of
    the next code. A shape that differs is an infinite error.
    """

    node: str
    kind: str
    error: float
    bound: float
    ok: bool


class EmittedModule:
    """The `model_ascend.py` of a folder: run only if it is, byte for byte, what `program` emits.

    `program` is the deployment's.
    """

    def __init__(self, program: Program, folder: Path) -> None:
        path = folder / FILE
        self.program = program
        self.emitted = functions(program)
        text = module_code(program, self.emitted)
        _require_equal(path, path.read_bytes() if path.is_file() else b"", text.encode())
        module = ModuleType(path.stem)
        exec(compile(text, str(path), "exec"), module.__dict__)
        self.names: dict[str, Any] = module.__dict__
        self.statements = {
            node.name: node.body[1:-1] for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)
        }
        self._read = self.names["WeightFiles"](folder)

    def of_block(self, block: str) -> list[Emitted]:
        """The emitted segments of a block of the graph."""
        return [call for call in self.emitted if call.segment.calls[0].meta["block"] == block]

    def load(self, block: str, read: Any = None) -> dict[str, EmittedWeights]:
        """The float32 weights of a block, each read when it is asked for, from the folder's files or by `read`, which
        knows the stored tensors."""
        loaded = {}
        for call in self.of_block(block):
            prefix, table = self.names["BLOCKS"][call.segment.key]
            loaded[call.segment.key] = EmittedWeights(table, partial(self._load, read or self._read, prefix))
        return loaded

    def _load(self, read: Any, prefix: str, table: dict[str, Any]) -> dict[str, Tensor]:
        return self.names["load_table"](read, table, prefix, torch.float32, "cpu")


def _require_equal(path: Path, stored: bytes, expected: bytes) -> None:
    if stored == expected:
        return
    lines = zip(stored.split(b"\n"), expected.split(b"\n"), strict=False)
    first = next(
        (
            f"line {number}"
            for number, (stored_line, expected_line) in enumerate(lines, 1)
            if stored_line != expected_line
        ),
        "its end",
    )
    raise FxquantError(path, f"{first} is not what the graph emits.", "Compile again, and do not edit the file.")


@torch.no_grad()
def check_statements(
    module: EmittedModule, block: str, weights: Weights, values: Mapping[str, Any]
) -> list[StatementCheck]:
    """Run every statement of `block` and compare what it assigns with the graph's value of the same node.

    weights  in float32, as `module.load(block)` gives them; none stays in memory
    values   graph node name → float32 value, for all nodes of the block, its parameters and inputs
    """
    checks: list[StatementCheck] = []
    for call in module.of_block(block):
        environment = _arguments(module, call, weights, values)
        for statement in module.statements[call.function.name]:
            assert isinstance(statement, ast.Assign)
            code = compile(ast.Module([statement], []), FILE, "exec")
            exec(code, module.names, environment)
            for name in (name.id for name in ast.walk(statement.targets[0]) if isinstance(name, ast.Name)):
                node = call.variables.get(name)
                if node is not None and node.name in values:
                    checks.append(_compare(node, environment[name], values))
                    # later statements read the graph's value, so that an error does not spread
                    environment[name] = to_engine(node, values[node.name])
    return checks


def _arguments(module: EmittedModule, call: Emitted, weights: Weights, values: Mapping[str, Any]) -> dict[str, Any]:
    """Local variables at the start of a function, all from the graph."""
    bound: dict[str, Any] = {"w": weights[call.segment.key], "dtype": torch.float32}
    for given in call.inputs:
        value = values[given.node.name]
        if given.hidden_keys:
            users = [user for user in given.node.users if user in call.segment.calls]
            attention = next(user for user in users if is_attention_mask(module.program, given.node, user))
            queries = values[operand_node(attention, "q").name].shape[1]
            bound[given.name] = module.names["find_hidden_keys"](value, queries)
        else:
            bound[given.name] = to_engine(given.node, value)
    return bound


def _compare(node: fx.Node, actual: Any, values: Mapping[str, Any]) -> StatementCheck:
    expected = to_engine(node, values[node.name])
    kind = operator_name(item_of(node)[0])
    if not isinstance(expected, Tensor):
        return StatementCheck(node.name, kind, 0.0, 0.0, _equal(actual, expected))
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return StatementCheck(node.name, kind, float("inf"), 0.0, False)
    if not expected.numel():
        return StatementCheck(node.name, kind, 0.0, 0.0, True)
    error = torch.where(actual == expected, 0.0, (actual.double() - expected.double()).abs())
    bound = error_bound(node, lambda argument: _value(argument, values), expected).double()
    inside = (error <= bound) & error.isfinite()
    return StatementCheck(node.name, kind, error.max().item(), bound.max().item(), bool(inside.all()))


def _value(argument: Any, values: Mapping[str, Any]) -> Any:
    return values[argument.name] if isinstance(argument, fx.Node) else argument


def _equal(actual: Any, expected: Any) -> bool:
    """For sizes, and tuples that stay whole."""
    if isinstance(expected, list | tuple):
        return len(actual) == len(expected) and all(_equal(a, b) for a, b in zip(actual, expected, strict=True))
    return torch.equal(actual, expected) if isinstance(expected, Tensor) else bool(actual == expected)
