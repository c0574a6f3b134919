"""Compile preparation: MODEL and options → the rewritten program; nothing is written yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fxquant.calibration.calibration_file import Calibration, earlier_calibrations, load_calibration
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.calibration.resume_folder import CalibrationFolder
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.compilation.engine_graph import check_graph
from fxquant.compilation.ledger import Ledger, build_ledger, check_parameters, mtp_modules
from fxquant.compilation.mtp_layers import why_no_mtp
from fxquant.compilation.options import (
    DEFAULT_POLICY,
    CalibrationOptions,
    CompileOptions,
    SourceOptions,
    as_path,
)
from fxquant.engines.contract import load_contract
from fxquant.engines.onnx_profile import weight_format
from fxquant.engines.table import ENGINES
from fxquant.errors import FxquantError
from fxquant.frontend.source import Source, open_source
from fxquant.lowering.destination import Input
from fxquant.lowering.workspace import made_of
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.models.mtp import mtp_linears
from fxquant.passes import (
    AssignMtp,
    AssignSchemes,
    Calibrate,
    CheckContract,
    FindRotation,
    PairSmoothing,
    Pass,
    PassResult,
    pipeline,
    run_passes,
)
from fxquant.policy.kinds import Kind
from fxquant.policy.policy import MtpMode, Policy
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.program.structural_hash import structural_hash
from fxquant.progress import Reporter, silent
from fxquant.runtime.device import open_device
from fxquant.text.load import load_batches, pad_id

CALIBRATION_FILES = ("calibration.jsonl", "calibration.txt", "calib.jsonl", "calib.txt")


@dataclass(kw_only=True)
class Prepared:
    """A model rewritten under a policy, nothing written yet."""

    source: Source
    policy: Policy
    program: Program
    ledger: Ledger
    float_graph: str
    structural_hash: str
    calibration: Calibration | None = None
    passes: list[PassResult] = field(default_factory=list)
    solved: SolvedCodes | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint that the program's weights are made from: the source's, transformed."""
        return transformed_checkpoint(self.source.checkpoint, self.calibration)


def prepare(
    source: Source,
    policy: Policy,
    options: CompileOptions,
    report: Reporter = silent,
    for_engine: bool = True,
    known: Sequence[Path] = (),
    folder: CalibrationFolder | None = None,
) -> Prepared:
    """Trace, check against the checkpoint, and run the pass pipeline; `for_engine`: with the target's contract.

    `known`: folders that may hold a calibration of the same files on the same text, to be used instead of a new one.
    `folder`: where an interrupted calibration leaves its state.
    """
    layers = mtp_modules(source.checkpoint, mtp_paths(source.config))
    policy = policy if options.mtp is None else with_mtp(policy, options.mtp, source, layers)
    calibrate = _calibrate(source, policy, options, report, known, folder)
    with report("trace", 1, "graph") as advance:
        program = source.program()
        advance(1)
    check_parameters(program, source.checkpoint)
    if for_engine:
        check_graph(source, program, options)
    float_graph, digest = dump_program(program), structural_hash(program)  # passes rewrite the program in place
    results = run_passes(program, passes_for(source, policy, options, layers, calibrate, for_engine))
    ledger = build_ledger(program, source.checkpoint)
    return Prepared(
        source=source,
        policy=policy,
        program=program,
        ledger=ledger,
        float_graph=float_graph,
        structural_hash=digest,
        calibration=calibrate.used,
        passes=results,
        solved=calibrate.solved,
    )


def named_policy(options: CompileOptions, source: Source) -> str:
    """The requested policy; else the one that a model.py names, else the default. An empty name is no policy."""
    asked = options.policy if options.policy is not None else source.policy
    return DEFAULT_POLICY if asked is None else asked


def transformed_checkpoint(checkpoint: Checkpoint, calibration: Calibration | None) -> Checkpoint:
    """`checkpoint` with the smoothing of a calibration applied."""
    return checkpoint.transformed(calibration.transforms) if calibration and calibration.transforms else checkpoint


def with_mtp(policy: Policy, mode: MtpMode, source: Source, layers: tuple[str, ...]) -> Policy:
    """`policy` with `--mtp` applied to the checkpoint's `layers`. Raises FxquantError unless there are as many as the
    config announces, and at least one."""
    announced = source.config.num_nextn_predict_layers
    if mode is not MtpMode.NONE and (not layers or len(layers) != announced):
        fact, way_out = why_no_mtp(source.checkpoint, source.config, layers)
        raise FxquantError(f"--mtp {mode}", fact, way_out)
    linears = [linear for path in layers for linear in mtp_linears(source.config, path)]
    rules = [policy.rule_for(linear.module, linear.kind, True) for linear in linears if linear.kind is not Kind.MTP]
    return policy.with_mtp(mode, any(rule is not None and rule.static for rule in rules))


def passes_for(
    source: Source,
    policy: Policy,
    options: CompileOptions,
    layers: tuple[str, ...],
    calibrate: Pass,
    for_engine: bool = True,
) -> list[Pass]:
    """The pipeline of these options; `layers` are the checkpoint's multi-token prediction layers."""
    engine = ENGINES[options.target]
    stored = weight_format(engine, options.onnx_form().profile)
    contract = CheckContract(policy.name, load_contract(options.target), options.tp, options.ep, options.mix)
    return pipeline(
        AssignSchemes(policy, layers, stored, engine.int4_group_size, options.target),
        calibrate,
        mtp=AssignMtp(policy, source.config, source.checkpoint, stored),
        rotation=FindRotation(policy),
        smoothing=PairSmoothing(policy),
        contract=contract if for_engine and not options.graph_only else None,
    )


def _calibrate(
    source: Source,
    policy: Policy,
    options: CalibrationOptions,
    report: Reporter,
    known: Sequence[Path],
    folder: CalibrationFolder | None,
) -> Calibrate:
    given = as_path(options.calibration)
    if given is not None and options.calib is not None:
        fact = "is given together with calibration text."
        raise FxquantError(f"--calibration {given}", fact, "Leave out one of --calibration and --calib.")
    if given is not None:
        return Calibrate(policy, source.checkpoint, lambda: None, report, load_calibration(given))
    stamps = stamp_files(checkpoint_files(source.checkpoint)) if known else {}
    return Calibrate(
        policy,
        source.checkpoint,
        lambda: calibration(source, options),
        report,
        earlier=earlier_calibrations(folder for folder in known if made_of(folder, stamps)),
        batch_size=options.batch_size,
        pad=pad_id(source.checkpoint),
        device=open_device(options.device),
        folder=folder,
    )


def calibration(source: Source, options: CalibrationOptions) -> list[Tensor] | None:
    """Documents of token ids from `options.calib`, or from the file beside the model; None when there is neither."""
    file = as_path(options.calib)
    if file is None:
        folders = (source.path if source.path.is_dir() else source.path.parent, source.checkpoint.folder)
        candidates = (folder / name for folder in folders for name in CALIBRATION_FILES)
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return None
    return load_batches(file, source.checkpoint, options.samples, options.seq_len)


def open_model(model: str | Path, options: SourceOptions, report: Reporter) -> Source:
    """Open MODEL; a model.py is run for that."""
    with report(f"open {model}", 1, "model") as advance:
        source = open_source(Path(model), as_path(options.checkpoint), options.trace_timeout)
        advance(1)
    return source


def source_inputs(source: Source) -> list[Input]:
    """The checkpoint's folder and its files, links followed."""
    files = [Input("a weight file", file) for file in sorted(checkpoint_files(source.checkpoint))]
    return [Input("the checkpoint", source.checkpoint.folder), *files]
