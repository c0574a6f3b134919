"""All checks of an output folder, in order: files, values, graphs."""

from pathlib import Path

from fxquant.binding import build_ledger, check_parameters
from fxquant.checkpoint import Checkpoint
from fxquant.lowering.manifest import GRAPH, file_sizes, read_manifest
from fxquant.lowering.verify.blocks import block_names, probe_inputs, walk
from fxquant.lowering.verify.graphs import AscendChecker, GraphChecker, OnnxChecker
from fxquant.lowering.verify.noise import logit_noise
from fxquant.lowering.verify.report import Check, VerifyReport
from fxquant.lowering.verify.weights import (
    WeightFiles,
    check_names,
    check_static,
    check_values,
    expected_stored,
    sample,
)
from fxquant.policy import LEAVE_OUT
from fxquant.program import Program
from fxquant.program_file import load_program
from fxquant.progress import Reporter
from fxquant.targets import Target
from fxquant.weights import Cached

SAMPLE_ABOVE = 1 << 30
"""Bytes of weights above which a sample is checked, unless the caller asks for all."""
SAMPLED_TENSORS = 256
NOISE_SEEDS = 8


def verify_output(folder: Path, source: Checkpoint | None, full: bool, report: Reporter) -> VerifyReport:
    """Hold `folder` against `source` (None: structure and graphs only). Streams; reads nothing whole but one module."""
    manifest = read_manifest(folder)
    program, files = load_program(folder / GRAPH), WeightFiles(folder)
    checks = [_check_sizes(manifest.files, folder)]
    if source is not None:
        checks.append(_check_source(program, source))
    stored = expected_stored(program, source, files)
    checks += check_names(program, files, folder, stored)
    sampled = not full and sum(tensor.nbytes for tensor in stored) > SAMPLE_ABOVE
    if all(check.ok for check in checks):
        units = sample(stored, SAMPLED_TENSORS if sampled else None)
        if source is not None:
            with report("verify weights", sum(unit.nbytes for unit in units), "bytes") as advance:
                checks += check_values(units, files, source, advance)
        else:
            checks.append(check_static(program, files))
    if all(check.ok for check in checks):
        checks += _check_graph(program, files, folder, Target(manifest.target), sampled, report)
    noise = None
    if not sampled and all(check.ok for check in checks):
        inputs = list(probe_inputs(program).values())
        noise = logit_noise(program, Cached(files.read, SAMPLE_ABOVE), inputs, NOISE_SEEDS)
    return VerifyReport(checks, None if source is None else str(source.folder), sampled, noise)


def _check_sizes(sizes: dict[str, int], folder: Path) -> Check:
    check = Check("files: present, size", len(sizes))
    found = file_sizes(folder)
    for name, size in sizes.items():
        check.expect(found.get(name) == size, f"{name}: {found.get(name, 'missing')} bytes, written with {size}")
    return check


def _check_source(program: Program, source: Checkpoint) -> Check:
    """Every source tensor is accounted for by the graph that was written."""
    check_parameters(program, source)
    left_out = tuple(module for module, rule in program.rules.items() if rule.scheme == LEAVE_OUT)
    ledger = build_ledger(program, source, left_out)
    check = Check("source tensors accounted for", len(ledger.entries))
    check.checked = len(ledger.entries)
    check.expect(sum(entry.nbytes for entry in ledger.entries) == source.nbytes, "bytes do not sum to the checkpoint")
    check.checked -= 1
    return check


def _check_graph(
    program: Program, files: WeightFiles, folder: Path, target: Target, sampled: bool, report: Reporter
) -> list[Check]:
    checker: GraphChecker = (OnnxChecker if target is Target.ONNX else AscendChecker)(program, folder)
    blocks = block_names(program)
    wanted = set(one_of_each_kind(program)) if sampled else set(blocks)
    with report("verify graph", len(wanted), "blocks") as advance:
        for block, values in walk(program, Cached(files.read, 1 << 28), wanted):
            checker.check(block, values)
            advance(1)
    return checker.checks


def one_of_each_kind(program: Program) -> list[str]:
    """The first block of each sequence of operators."""
    first: dict[tuple, str] = {}
    for block in block_names(program):
        nodes = program.graph.graph.nodes
        operators = tuple(str(n.target) for n in nodes if n.op == "call_function" and n.meta["block"] == block)
        first.setdefault(operators, block)
    return list(first.values())
