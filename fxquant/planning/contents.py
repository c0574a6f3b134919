"""Plan contents: what a compile would read, and what it would write, file by file."""

import math
from dataclasses import dataclass, field, replace

from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.compilation.engine_graph import check_graph
from fxquant.compilation.ledger import build_ledger, check_parameters, mtp_modules
from fxquant.compilation.options import CompileOptions
from fxquant.compilation.prepare import passes_for, with_mtp
from fxquant.engines.contract import load_contract
from fxquant.engines.engine import Engine
from fxquant.engines.reserves import reserves
from fxquant.engines.table import ENGINES
from fxquant.frontend.source import Source
from fxquant.lowering.output_folder.description import description_size, engine_config, index_size, json_size
from fxquant.lowering.output_folder.layout import FileLayout, plan_files, stored_tensors
from fxquant.lowering.output_folder.rotation_file import FILE as ROTATION_FILE
from fxquant.lowering.output_folder.rotation_file import rotation_file_size
from fxquant.lowering.output_folder.serving_page import serve_line, serving_of
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.passes import Pass, PassResult, choices, findings, run_passes
from fxquant.passes.check_contract import linears
from fxquant.planning.config_checkpoint import config_checkpoint
from fxquant.planning.tally import PlanRow, tally
from fxquant.policy.policy import LEAVE_OUT, Policy
from fxquant.program.program import Program
from fxquant.transforms.weight_transforms import WeightTransforms


@dataclass(frozen=True, kw_only=True)
class PlanContents:
    """Sizes in bytes.

    rows        what is read and written, by kind and scheme
    work        kernel of `fxquant.planning.host_benchmark` → weights it quantizes, or bytes it copies
    files       weight file → its bytes, header included
    documents   description, index where there is one, and config.json → bytes
    operators   calls in the float graph, and in the rewritten one
    unverified  what has not been shown to work on the target
    choices     what the policy left open, as it was decided
    reserves    what the target accepts though nobody ran it, by how that is known
    serve       how to serve it: a command or a setting, as one line
    notes       keys of config.json that are not read, or that other code reads in another way
    whole       memory of a worker while rotation mixes the rows of the largest weight: twice that weight
    """

    rows: list[PlanRow]
    work: dict[str, int]
    files: dict[str, int]
    documents: dict[str, int]
    operators: tuple[int, int]
    unverified: list[str]
    choices: list[str]
    reserves: list[str]
    serve: str
    whole: int
    notes: list[str] = field(default_factory=list)

    @property
    def bytes_in(self) -> int:
        """Bytes read from the checkpoint."""
        return sum(row.bytes_in for row in self.rows if row.scheme != LEAVE_OUT)

    @property
    def bytes_out(self) -> int:
        """All weight files and documents."""
        return sum(self.files.values()) + sum(self.documents.values())


class RangesLater(Pass):
    """Replaces calibration in a plan: the sizes that a static scheme stores do not depend on the ranges."""

    name = "calibrate"

    def apply(self, program: Program) -> PassResult:
        return PassResult(self.name)


def planned(source: Source, policy: Policy, options: CompileOptions) -> PlanContents:
    """Trace, run the passes, and lay out the files. Raises FxquantError as `prepare` does."""
    program = source.program()
    described = not source.checkpoint.tensors
    if described:  # it has by construction what the program needs: nothing to check
        source = replace(source, checkpoint=config_checkpoint(source.checkpoint, program, source.config))
    else:
        check_parameters(program, source.checkpoint)
    check_graph(source, program, options)
    before = _calls(program)
    layers = mtp_modules(source.checkpoint, mtp_paths(source.config))
    policy = policy if options.mtp is None else with_mtp(policy, options.mtp, source, layers)
    results = run_passes(program, passes_for(source, policy, options, layers, RangesLater()))
    if not described:
        build_ledger(program, source.checkpoint)
    checkpoint = source.checkpoint.transformed(WeightTransforms(tensors=program.added))
    stored, engine = stored_tensors(program, checkpoint), ENGINES[options.target]
    files = plan_files(stored, options.max_shard_size, engine)
    totals = tally(program, checkpoint, stored)
    return PlanContents(
        rows=list(totals.rows.values()),
        work=totals.work,
        files={file.name: file.nbytes for file in files},
        documents=_documents(program, files, engine, checkpoint),
        operators=(before, _calls(program)),
        unverified=findings(results),
        choices=choices(results),
        reserves=reserves(load_contract(options.target), linears(program)),
        serve=_serve(program, options),
        notes=source.notes,
        whole=2
        * max(
            (_numbers(checkpoint, name) for name, rotation in program.rotations.items() if rotation.heads), default=0
        ),
    )


def _serve(program: Program, options: CompileOptions) -> str:
    alone = options.graph_only and ENGINES[options.target].model_code
    serving = None if alone else serving_of(program, options.target, options.tp, options.ep)
    return serve_line(options.target, serving, "OUT" if options.out is None else str(options.out))


def _numbers(checkpoint: Checkpoint, name: str) -> int:
    """Bytes of a weight in the dtype in which it is rotated."""
    return math.prod(checkpoint.tensors[name].shape) * checkpoint.stored_dtype(name).itemsize


def _calls(program: Program) -> int:
    return sum(node.op == "call_function" for node in program.graph.graph.nodes)


def _documents(program: Program, files: list[FileLayout], engine: Engine, checkpoint: Checkpoint) -> dict[str, int]:
    """Document → its bytes, as `lowering.output` writes it."""
    sizes = {engine.description: description_size(program, files, engine)}
    if len(files) > 1 or engine.numbered:
        sizes[engine.index] = index_size(files)
    if program.stream:
        sizes[ROTATION_FILE] = rotation_file_size(program.stream)
    return sizes | {"config.json": json_size(engine_config(program, engine, checkpoint.folder))}
