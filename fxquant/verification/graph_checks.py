"""Graph checks: emitted graphs against the rewritten fx graph, every operator on the graph's own input values."""

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from fxquant import ops
from fxquant.errors import FxquantError
from fxquant.lowering.ascend.deployment import deployment
from fxquant.lowering.onnx.chain import BlockChain
from fxquant.lowering.onnx.deployment import deployment as onnx_deployment
from fxquant.lowering.onnx.extract import operator_sessions, run_by_rows
from fxquant.lowering.onnx.last_logits import KEEP_ALL
from fxquant.lowering.onnx.required import require_model, stored_form
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.processes.memory import return_freed_memory
from fxquant.program.linears import is_parameter
from fxquant.program.operands import operand, operand_node
from fxquant.program.program import Program
from fxquant.runtime.divergence import Divergence, divergence
from fxquant.runtime.execute import execute
from fxquant.runtime.large_matrix import WHOLE, is_large, with_large_matrices
from fxquant.runtime.weight_providers import Read
from fxquant.verification.ascend_statements import EmittedModule, check_statements
from fxquant.verification.block_bounds import distance_bound, rewritten_value
from fxquant.verification.blocks import block_names, probe_inputs
from fxquant.verification.onnx_bounds import error_bound
from fxquant.verification.report import Check


class GraphChecker(Protocol):
    """Checks blocks one by one and collects the results. `program`: the one whose blocks and values it takes."""

    program: Program
    checks: list[Check]

    def check(self, block: str, values: dict[str, Any]) -> None:
        """`values`: every value that the block's nodes read or make, by node name."""


class Comparison:
    """Two lines of the table: integers, which must be equal, and floats, which must be within their bounds."""

    def __init__(self, graph: str) -> None:
        self.integers = Check(f"{graph} == fx graph, integers", 0)
        self.floats = Check(f"{graph} ≈ fx graph, floats", 0)
        self._worst = 0.0

    @property
    def checks(self) -> list[Check]:
        return [self.integers, self.floats]

    def add(self, node: str, error: float, bound: float, ok: bool, exact: bool) -> None:
        """One value: its largest error and bound; `ok` holds element by element."""
        check = self.integers if exact else self.floats
        check.total += 1
        check.expect(ok, f"{node}: off by {error:.3g}, the bound is {bound:.3g}")
        ratio = error / bound if bound else 0.0
        if not exact and ratio >= self._worst:
            self._worst = ratio
            check.worst = f"{error:.2g} of {bound:.2g} at {node}"


class AscendChecker:
    """Runs `model_ascend.py` statement by statement on the CPU reference of the NPU operators, in float32.

    The file must be, byte for byte, what the stored graph emits: nothing else is ever executed. `program` is the
    deployment of that graph.
    """

    end_to_end: Divergence | None = None
    """Its operators are those of a device, which does not run here."""

    def __init__(self, program: Program, folder: Path) -> None:
        self.program = deployment(program).program
        self._module = EmittedModule(self.program, folder)
        files = WeightFiles(folder)
        self._read = with_large_matrices(files.read, files.infos, files.read_rows)
        self._comparison = Comparison("Ascend graph")
        self.checks = self._comparison.checks

    def check(self, block: str, values: dict[str, Any]) -> None:
        for statement in check_statements(self._module, block, self._module.load(block, self._read), values):
            self._comparison.add(
                statement.node, statement.error, statement.bound, statement.ok, exact=statement.bound == 0.0
            )


BLOCKS = (ops.block_linear, ops.block_experts)


class OnnxChecker:
    """Runs `model.onnx` operator by operator in ONNX Runtime, each with the inputs of the fx graph.

    The model must be what the stored graph emits: no session is created for any other. `program` is the deployment of
    that graph. Attention that has two orders of products runs twice: over all queries, and for the last one alone.
    Operators of onnxruntime's own are also compared with what the stored graph computes in their place.

    end_to_end  the logits of the emitted blocks, each on what those before it returned, from the fx graph's; None
                unless all blocks were checked, which `whole` promises
    logits      of these, if they are to be compared with the stored graph's, which computes other values
    """

    def __init__(self, program: Program, folder: Path, whole: bool = False) -> None:
        self.program, self._folder = program, folder
        self.end_to_end: Divergence | None = None
        self.logits: Tensor | None = None
        self._comparison = Comparison("ONNX graph")
        self._emitted = Check("ONNX graph, as emitted", 1)
        self._distance = Check("ONNX graph ≈ int8 per token", 0)
        self.checks = [self._emitted, *self._comparison.checks]
        try:
            form = stored_form(folder)
            self.program = onnx_deployment(program, form).program
            require_model(self.program, form, WeightFiles(folder).infos, folder)
            self._emitted.expect(True, "")
        except FxquantError as error:
            self._emitted.expect(False, str(error))
        self._nodes = {node.name: node for node in self.program.graph.graph.nodes}
        self._logits = self.program.graph.results[0].name
        self._blocks = {block: self._names(block) for block in block_names(self.program)}
        self._large = self._large_linears(WeightFiles(folder)) if self._emitted.ok else {}
        self._chain = BlockChain(folder, self._blocks, self._large) if whole and self._emitted.ok else None
        self._farthest = 0.0
        self.checks += [self._distance] if any(node.target in BLOCKS for node in self._nodes.values()) else []

    def check(self, block: str, values: dict[str, Any]) -> None:
        if not self._emitted.ok:
            return
        names, values = self._blocks[block], values | KEEP_ALL
        self._run(names, values)
        for name in names:
            if self._nodes[name].target in (ops.attend_latents, ops.attend_halves):
                queries = operand_node(self._nodes[name], "q").name
                self._run([name], values | {key: values[key][:, -1:] for key in (queries, name)})
        if self._chain is not None:
            for result in self._chain.run(block, values, {self._logits}.intersection(names)).values():
                self.end_to_end = divergence(result, values[self._logits])
                self.logits = result if any(node.target in BLOCKS for node in self._nodes.values()) else None

    def compare_stored(self, program: Program, read: Read) -> None:
        """Measure `end_to_end` from the logits of the stored graph, `program`, where its deployment computes others."""
        if self.logits is not None:
            ((expected, *_),) = execute(program, read, [list(probe_inputs(program).values())])
            self.end_to_end = divergence(self.logits, expected)

    def _large_linears(self, files: WeightFiles) -> dict[str, str]:
        """Calls of linears without a bias, whose weights no session holds whole → the names of these."""
        found = {}
        for name, node in self._nodes.items():
            if node.target == ops.router_logits or (node.target == ops.linear and operand(node, "bias") is None):
                weight = operand_node(node, "weight")
                stored = self.program.parameter(weight).names[0] if is_parameter(weight) else ""
                if stored in files.infos and is_large(files.infos[stored]):
                    found[name] = stored
        return found

    def _names(self, block: str) -> list[str]:
        return [node.name for node in self._nodes.values() if node.meta.get("block") == block]

    def _run(self, names: list[str], values: dict[str, Any]) -> None:
        for name in self._large.keys() & set(names):
            result = run_by_rows(self._folder, name, self._large[name], values)
            self._compare(name, result, values)
        for session in operator_sessions(self._folder, [name for name in names if name not in self._large], WHOLE):
            units, results = session.units, session(session.feeds(values))
            del session  # with its weights, before those of the bounds are widened
            return_freed_memory()
            for unit in units:
                for name in unit.outputs:
                    self._compare(name, results[name], values)

    def _compare(self, name: str, result: Tensor, values: dict[str, Any]) -> None:
        expected = values[name] if isinstance(values[name], Tensor) else torch.tensor([values[name]])
        exact = not expected.is_floating_point()
        if result.shape != expected.shape or result.dtype != expected.dtype:
            self._comparison.add(name, float("inf"), 0.0, False, exact)
        elif expected.numel():
            error = torch.where(result == expected, 0.0, (result.double() - expected.double()).abs())
            bound = error_bound(self._nodes[name], lambda operand: _value(operand, values), expected)
            self._comparison.add(name, float(error.max()), float(bound.max()), bool((error <= bound).all()), exact)
            if self._nodes[name].target in BLOCKS:
                self._compare_rewritten(name, result, bound, values)

    def _compare_rewritten(self, name: str, result: Tensor, bound: Tensor, values: dict[str, Any]) -> None:
        """How far an operator of onnxruntime's own is from what the stored graph computes there: by the norm."""
        node = self._nodes[name]
        rewritten = rewritten_value(node, lambda operand: _value(operand, values)).double()
        error = result.double() - rewritten
        allowed = distance_bound(node, lambda operand: _value(operand, values), bound)
        farthest = float((error.abs() - allowed).max())
        share = float(error.norm() / rewritten.norm().clamp(min=1e-300))
        self._distance.total += 1
        self._distance.expect(farthest <= 0, f"{name}: {share:.2g} of the norm, one value {farthest:.2g} too far")
        if share >= self._farthest:
            self._farthest, self._distance.worst = share, f"{share:.2g} of the norm at {name}"


def _value(argument: Any, values: dict[str, Any]) -> Any:
    return values[argument.name] if isinstance(argument, fx.Node) else argument
