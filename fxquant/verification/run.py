"""Verify: all checks of an output folder, in order: files, values, graphs."""

import os
from dataclasses import dataclass
from pathlib import Path

from fxquant.calibration.calibration_file import CALIBRATION, load_calibration
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.compilation.ledger import build_ledger, check_parameters
from fxquant.engines.contract import load_contract
from fxquant.engines.documents import group_size
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.serving import RankLayout
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.lowering.output_folder.copies import copied_files
from fxquant.lowering.output_folder.layout import StoredTensor
from fxquant.lowering.output_folder.manifest import FLOAT_GRAPH, GRAPH, Manifest, find_manifest
from fxquant.lowering.output_folder.rotation_file import FILE as ROTATION_FILE
from fxquant.lowering.output_folder.weight_files import WeightFiles
from fxquant.passes.check_contract import linears
from fxquant.processes.memory import memory_for, return_freed_memory
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.progress import Reporter
from fxquant.runtime.divergence import Divergence
from fxquant.runtime.large_matrix import with_large_matrices
from fxquant.runtime.weight_providers import Cached, Read, RecipeWeights
from fxquant.verification.blocks import block_names, one_of_each_kind, probe_inputs, walk
from fxquant.verification.contract_checks import check_contract, takes_dtype, unverified
from fxquant.verification.document_checks import Documents, check_copies, documents
from fxquant.verification.engine_check import EngineChecker
from fxquant.verification.file_checks import check_digests, check_sizes, infer_target
from fxquant.verification.foreign_weights import compare_foreign, formulas_alone
from fxquant.verification.graph_checks import AscendChecker, GraphChecker, OnnxChecker
from fxquant.verification.module_check import StoredCodes
from fxquant.verification.noise import last_bit_noise
from fxquant.verification.rebuild import Rebuild, check_rebuild
from fxquant.verification.remade import Remade, check_remade
from fxquant.verification.report import Check, VerifyReport
from fxquant.verification.transform_checks import (
    check_calibration,
    check_rotation,
    check_rotation_file,
    check_smoothing,
)
from fxquant.verification.unread import unread_with, unread_without
from fxquant.verification.weight_checks import (
    check_names,
    check_static,
    check_values,
    expected_stored,
    sample,
)

SAMPLE_ABOVE = 1 << 30
"""Bytes of weights above which a sample is checked, unless the caller asks for all."""
SAMPLED_TENSORS = 256
SAMPLED_EXPERTS = 8
SAMPLED_ROWS = 64
"""Of each searched module, whose reference tries every scale of a row."""
NOISE_SEEDS = 8
UNCLAIMED = {"weight files": "as an engine reads them: the output is for its own graph alone"}
NOT_RUN = {"model.onnx": "end to end: blocks of each kind were compared; --full runs all of them"}
MORE = "Give it 2 GB and what three of the largest modules take; compile --no-verify leaves it for another machine."
VALUE_CACHE = 1 << 26
"""Bytes of weights that a walk over the graph keeps."""


@memory_for("verify", MORE)
def verify_output(
    folder: Path,
    source: Checkpoint | None,
    full: bool,
    report: Reporter,
    tp: int | None = None,
    target: Target | None = None,
    rebuild: Rebuild | None = None,
    ep: int | None = None,
) -> VerifyReport:
    """Check `folder` against `source` (None: structure and graphs only). Streams; reads at most one module whole.

    `tp`, `ep`: ranks that the engine's reader splits over; None: those it was checked for when it was written.
    `target`: None: the manifest's; without a manifest, the one that the files show. `rebuild`: also quantize weights
    again, which needs `source`. A digest or rebuilt tensor that differs stops no other check: those show what is wrong.
    """
    manifest = find_manifest(folder)
    program, original = load_program(folder / GRAPH), source
    files, source = WeightFiles(folder, program), _transformed(source, folder)
    target = target or (Target(manifest.target) if manifest else infer_target(program, folder))
    layout = _layout(manifest, program, target, tp, ep)
    foreign = manifest is not None and manifest.foreign
    stored = expected_stored(program, None if foreign else source, files)
    sampled = not full and sum(tensor.nbytes for tensor in stored) > SAMPLE_ABOVE
    output = _Output(folder, program, files, source, target, layout, sampled, foreign)
    said = documents(program, folder, stored, files, target)
    digests, again = _check_bytes(output, manifest, said, original, report)
    claimed = not manifest.graph_only if manifest else again.published
    checks = [check_sizes(manifest, folder)] if manifest else []
    checks += [] if original is None else [_check_source(program, original)]
    if source is not None and not foreign:
        check_parameters(program, source)
    checks += [check_names(files, stored), *_check_documents(output, said)]
    checks += [check_contract(program, target, layout)] if claimed else []
    rebuilt = []
    if rebuild is not None and source is not None:
        rebuilt = [check_rebuild(program, files, source, rebuild.sample, report)]
    uncompared: dict[str, str] = {}
    end_to_end = None
    # each step reads what the one before it has checked
    if all(check.ok for check in checks):
        values, uncompared = _check_values(output, stored, report)
        checks += values
        if original is not None and source is not None and source.transforms:
            checks += _check_transforms(original, source, folder)
        if manifest is None and source is not None:
            checks.append(check_calibration(folder, checks))
    if all(check.ok for check in checks):
        graphs, end_to_end = _check_graphs(output, claimed, report)
        checks += graphs
    noise = _noise(output) if all(check.ok for check in checks) else None
    return VerifyReport(
        checks=[*digests, *rebuilt, *checks],
        source=None if source is None else str(source.folder),
        sampled=sampled,
        partial=bool(uncompared),
        noise=noise,
        end_to_end=end_to_end,
        unread=_unread(output, said, again, manifest is None, claimed) | uncompared,
    )


def _check_bytes(
    output: "_Output", manifest: Manifest | None, said: Documents, original: Checkpoint | None, report: Reporter
) -> tuple[list[Check], Remade]:
    """Digests of a manifest; without one, the files that can be made again."""
    if manifest:
        return [check_digests(manifest, output.folder, report, output.program)], Remade()
    again = check_remade(
        output.folder, output.program, original, ENGINES[output.target].npu_graph and not output.sampled
    )
    return [*_check_alone(output, said), *again.checks], again


def _layout(manifest: Manifest | None, program: Program, target: Target, tp: int | None, ep: int | None) -> RankLayout:
    if tp is None and ep is None:
        return manifest.layout if manifest else RankLayout()
    return checked_layout(load_contract(target), linears(program), tp, ep)


@dataclass(frozen=True)
class _Output:
    """What all checks read: a folder and its graph, for `target` on the ranks of `layout`, and the source.

    `foreign`: others chose its integers.
    """

    folder: Path
    program: Program
    files: WeightFiles
    source: Checkpoint | None
    target: Target
    layout: RankLayout
    sampled: bool
    foreign: bool

    @property
    def read(self) -> Read:
        """Its tensors, the largest in blocks of rows."""
        return with_large_matrices(self.files.read, self.files.infos, self.files.read_rows)


def _check_documents(output: _Output, said: Documents) -> list[Check]:
    others = [name for name in said.expected if name != "config.json"]
    checks = [said.check("description and index", others), said.check("config.json", ["config.json"])]
    stream = output.program.stream
    return [*checks, check_rotation_file(output.folder, stream)] if stream else checks


def _check_alone(output: _Output, said: Documents) -> list[Check]:
    """Checks of documents, in place of the digests of a manifest."""
    copies = [check_copies(output.source, output.folder)] if output.source is not None else []
    return [said.written(output.program), *copies]


def _noise(output: _Output) -> Divergence | None:
    if output.sampled:
        return None
    inputs = list(probe_inputs(output.program).values())
    return last_bit_noise(output.program, Cached(output.read, VALUE_CACHE), inputs, NOISE_SEEDS)


def _unread(output: _Output, said: Documents, again: Remade, alone: bool, claimed: bool) -> dict[str, str]:
    parts = {} if claimed else UNCLAIMED
    if output.sampled and not ENGINES[output.target].npu_graph:
        parts = parts | NOT_RUN
    if not alone:
        return unread_with(output.folder) | parts
    source = output.source
    known = {info.file.name for info in output.files.infos.values()} | set(said.expected)
    known |= {ROTATION_FILE} if output.program.stream else set()
    known |= set(copied_files(source)) if source is not None else set()
    rotated = source is not None and bool(source.transforms.rotations)
    unread = unread_without(output.folder, ENGINES[output.target], known, rotated) | again.unread
    return {name: what for name, what in (unread | parts).items() if what}


def _transformed(source: Checkpoint | None, folder: Path) -> Checkpoint | None:
    """The source with the weight transforms of the output's own calibration."""
    saved = folder / CALIBRATION
    if source is None or not os.path.lexists(saved):
        return source
    if not saved.is_file():
        raise FxquantError(saved, "not a regular file.", "Copy the file again, or compile again.")
    return source.transformed(load_calibration(saved).transforms)


def _check_transforms(original: Checkpoint, source: Checkpoint, folder: Path) -> list[Check]:
    rotated = bool(source.transforms.rotations)
    checks = [check_rotation(load_program(folder / FLOAT_GRAPH), original, source.transforms)] if rotated else []
    return [*checks, check_smoothing(original, source.transforms)]


def _check_source(program: Program, source: Checkpoint) -> Check:
    """Every source tensor is accounted for by the graph that was written."""
    ledger = build_ledger(program, source)
    check = Check("source tensors accounted for", len(ledger.entries))
    check.checked = len(ledger.entries)
    check.expect(sum(entry.nbytes for entry in ledger.entries) == source.nbytes, "bytes do not sum to the checkpoint")
    check.checked -= 1
    return check


def _check_values(output: _Output, stored: list[StoredTensor], report: Reporter) -> tuple[list[Check], dict[str, str]]:
    """Every tensor, or a sample, against the source; without one, static parameters among themselves. And what could
    not be compared."""
    program, source = output.program, output.source
    if source is None:
        return [formulas_alone(output.files, program) if output.foreign else check_static(program, output.files)], {}
    units = sample(stored, SAMPLED_TENSORS if output.sampled else None)
    if output.foreign:
        original = load_program(output.folder / FLOAT_GRAPH)
        return compare_foreign(output.files, source, program, original, units, report)
    with report("verify weights", sum(unit.nbytes for unit in units), "bytes") as advance:
        return check_values(units, output.files, source, advance, SAMPLED_ROWS if output.sampled else None), {}


def _check_graphs(output: _Output, claimed: bool, report: Reporter) -> tuple[list[Check], Divergence | None]:
    """Block by block: the emitted graph, and, if it is `claimed`, the engine that will read the weights. And how far
    the logits of the emitted graph are, where it runs end to end.

    The engine is compared with the graph on integers quantized from the source: for a sampled model, the files were not
    compared in full.
    """
    program, folder, files = output.program, output.folder, output.files
    engine = ENGINES[output.target]
    graph: AscendChecker | OnnxChecker
    graph = AscendChecker(program, folder) if engine.npu_graph else OnnxChecker(program, folder, not output.sampled)
    checks = _check_graph("verify graph", graph, output.read, output.sampled, report)
    if isinstance(graph, OnnxChecker):
        graph.compare_stored(program, Cached(output.read, VALUE_CACHE))
    if not claimed or not takes_dtype(program, output.target):
        return checks, graph.end_to_end
    reader = engine.read(folder, output.layout, group_size(program))
    if reader is None:
        return checks, graph.end_to_end
    sampled = SAMPLED_EXPERTS if output.sampled else None
    checker = EngineChecker(program, reader, unverified(program, output.target, output.layout), sampled)
    given = None if output.foreign else output.source
    read = output.read
    if given is not None:
        made = RecipeWeights(program, given, StoredCodes(program, files))
        read = with_large_matrices(made, files.infos, given.read_rows)
    return checks + _check_graph("verify reader", checker, read, output.sampled, report), graph.end_to_end


def _check_graph(stage: str, checker: GraphChecker, read: Read, sampled: bool, report: Reporter) -> list[Check]:
    program = checker.program
    selected = set(one_of_each_kind(program) if sampled else block_names(program))
    with report(stage, len(selected), "blocks") as advance:
        for block, values in walk(program, Cached(read, VALUE_CACHE), selected):
            checker.check(block, values)
            del values  # before the next block's are made
            return_freed_memory()
            advance(1)
    return checker.checks
