"""MODEL and options → the rewritten program, with nothing written yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from fxquant.calibration.calibration_file import Calibration, earlier_calibrations, load_calibration
from fxquant.calibration.gptq_codes import SolvedCodes
from fxquant.calibration.resume_folder import CalibrationFolder
from fxquant.checkpoint.checkpoint import Checkpoint
from fxquant.checkpoint.stamped_reader import checkpoint_files, stamp_files
from fxquant.compilation.ledger import Ledger, build_ledger, check_parameters, mtp_modules
from fxquant.compilation.mtp_layers import why_no_mtp
from fxquant.errors import FxquantError
from fxquant.frontend.source import TRACE_TIMEOUT, Source, open_source
from fxquant.lowering.destination import Input
from fxquant.lowering.output_folder.layout import MAX_SHARD_SIZE
from fxquant.lowering.output_folder.manifest import MANIFEST
from fxquant.lowering.weights.work import Workers
from fxquant.lowering.workspace import made_of
from fxquant.models.deepseek_v3 import mtp_paths
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
from fxquant.policy.policy import MtpMode, Policy
from fxquant.program.program import Program
from fxquant.program.program_file import dump_program
from fxquant.program.structural_hash import structural_hash
from fxquant.progress import Reporter, silent
from fxquant.runtime.device import open_device
from fxquant.targets.contract import load_contract
from fxquant.targets.engines import ENGINES
from fxquant.targets.target import Target
from fxquant.text.load import load_batches, pad_id

DEFAULT_POLICY = "deepseek_w4a8"
REUSE = "--reuse"
CALIBRATION_FILES = ("calibration.jsonl", "calibration.txt", "calib.jsonl", "calib.txt")


@dataclass(frozen=True)
class CompileOptions:
    """What `compile` takes besides the model.

    policy          name of a shipped policy or path of a YAML file; None: the model file's POLICY or deepseek_w4a8
    out             output folder; None: `./<name>-<policy>-<target>`
    calib           calibration text or token ids; None: the file that lies beside the model, if any
    calibration     calibration.safetensors of an output, in place of text
    samples         documents to calibrate on, each of at most `seq_len` tokens
    device          where calibration runs the model: cpu, cuda or npu
    batch_size      documents that are calibrated on together; `batch_mean` means over such batches
    checkpoint      overrides the folder that a model.py names
    trace_timeout   seconds that a model.py may take to import, build and trace
    max_shard_size  bytes of tensor data a weight file may hold
    force           replace an earlier output of fxquant at `out`
    tp              tensor-parallel ranks that the output will be served on
    mtp             multi-token prediction layers: none, float or quant; None: as the policy says
    export          write the NPU graph as torch.export programs (.pt2) too
    mix             whether the engine will run shared experts as routed ones; None: as the policy needs it
    workers         how many workers fill the weight files, and where
    reuse           earlier output to take equal tensors from; None: with `force` the one that is replaced
    restart         discard unfinished work in `<out>.partial`
    """

    policy: str | None = None
    out: str | Path | None = None
    target: Target = Target.ASCEND
    calib: str | Path | None = None
    samples: int = 32
    seq_len: int = 256
    checkpoint: str | Path | None = None
    trace_timeout: float = TRACE_TIMEOUT
    max_shard_size: int = MAX_SHARD_SIZE
    force: bool = False
    verify: bool = True
    kv_cache: str | None = None
    tp: int = 1
    mtp: MtpMode | None = None
    mix: bool | None = None
    export: bool = True
    calibration: str | Path | None = None
    workers: Workers = field(default_factory=Workers)
    reuse: str | Path | None = None
    restart: bool = False
    batch_size: int = 1
    device: str = "cpu"

    def earlier_output(self, out: Path) -> Path | None:
        """The folder to take equal tensors from."""
        replaced = out if self.force and (out / MANIFEST).is_file() else None
        return as_path(self.reuse) or replaced

    def inputs(self, model: Path) -> list[Input]:
        """Every file and folder that the options and MODEL name. What is reused may be the output that is replaced."""
        named = {"--checkpoint": self.checkpoint, "--calib": self.calib, "--calibration": self.calibration}
        own = self.policy is not None and self.policy.endswith((".yaml", ".yml"))
        policy = self.policy if own and Path(str(self.policy)).exists() else None  # of a missing one its reader tells
        named |= {"--policy": policy, REUSE: self.reuse}
        given = [Input(label, Path(path), label == REUSE) for label, path in named.items() if path is not None]
        return [Input("the checkpoint" if model.is_dir() else "the model", model), *given]


@dataclass
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
        """What the program's weights are made from: the source's, smoothed."""
        return smoothed_source(self.source.checkpoint, self.calibration)


def prepare(
    source: Source,
    policy: Policy,
    options: CompileOptions,
    report: Reporter = silent,
    for_engine: bool = True,
    known: Sequence[Path] = (),
    folder: CalibrationFolder | None = None,
) -> Prepared:
    """Trace, check against the checkpoint, and run the pass pipeline; `for_engine` with the target's contract.

    `known`: folders that may hold a calibration of the same files on the same text, which need not be repeated then.
    `folder`: where one that is killed leaves what it has seen.
    """
    layers = mtp_modules(source.checkpoint, mtp_paths(source.config))
    policy = policy if options.mtp is None else with_mtp(policy, options.mtp, source, layers)
    calibrate = _calibrate(source, policy, options, report, known, folder)
    with report("trace", 1, "graph") as advance:
        program = source.program()
        advance(1)
    check_parameters(program, source.checkpoint)
    float_graph, digest = dump_program(program), structural_hash(program)
    results = run_passes(program, passes_for(source, policy, options, layers, calibrate, for_engine))
    ledger = build_ledger(program, source.checkpoint)
    return Prepared(source, policy, program, ledger, float_graph, digest, calibrate.used, results, calibrate.solved)


def named_policy(options: CompileOptions, source: Source) -> str:
    """The policy that was asked for; else the one that a model.py names, else the default. An empty name is none."""
    asked = options.policy if options.policy is not None else source.policy
    return DEFAULT_POLICY if asked is None else asked


def smoothed_source(checkpoint: Checkpoint, calibration: Calibration | None) -> Checkpoint:
    """`checkpoint` as a calibration smoothed it."""
    return checkpoint.smoothed(calibration.smoothing) if calibration and calibration.smoothing else checkpoint


def with_mtp(policy: Policy, mode: MtpMode, source: Source, layers: tuple[str, ...]) -> Policy:
    """`policy` with what `--mtp` asks of the checkpoint's `layers`. Raises FxquantError unless they are those that the
    config announces, and some."""
    announced = source.config.num_nextn_predict_layers
    if mode is not MtpMode.NONE and (not layers or len(layers) != announced):
        fact, way_out = why_no_mtp(source.checkpoint, source.config, layers)
        raise FxquantError(f"--mtp {mode}", fact, way_out)
    return policy.with_mtp(mode)


def passes_for(
    source: Source,
    policy: Policy,
    options: CompileOptions,
    layers: tuple[str, ...],
    calibrate: Pass,
    for_engine: bool = True,
) -> list[Pass]:
    """The pipeline of these options; `layers` are the checkpoint's multi-token prediction layers."""
    dialect = ENGINES[options.target].dialect
    contract = CheckContract(policy.name, load_contract(options.target), options.tp, options.mix)
    return pipeline(
        AssignSchemes(policy, layers, dialect),
        calibrate,
        mtp=AssignMtp(policy, source.config, source.checkpoint, dialect),
        rotation=FindRotation(policy),
        smoothing=PairSmoothing(policy),
        contract=contract if for_engine else None,
    )


def _calibrate(
    source: Source,
    policy: Policy,
    options: CompileOptions,
    report: Reporter,
    known: Sequence[Path],
    folder: CalibrationFolder | None,
) -> Calibrate:
    given = as_path(options.calibration)
    if given is not None and options.calib is not None:
        fact = "ranges and text to make ranges of, both given."
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


def calibration(source: Source, options: CompileOptions) -> list[Tensor] | None:
    """Documents of token ids from `options.calib`, or from the file beside the model; None when there is neither."""
    file = as_path(options.calib)
    if file is None:
        folders = (source.path if source.path.is_dir() else source.path.parent, source.checkpoint.folder)
        candidates = (folder / name for folder in folders for name in CALIBRATION_FILES)
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return None
    return load_batches(file, source.checkpoint, options.samples, options.seq_len)


def open_model(model: str | Path, options: CompileOptions, report: Reporter) -> Source:
    """MODEL, opened; a model.py is run meanwhile."""
    with report(f"open {model}", 1, "model") as advance:
        source = open_source(Path(model), as_path(options.checkpoint), options.trace_timeout)
        advance(1)
    return source


def source_inputs(source: Source) -> list[Input]:
    """The checkpoint's folder, and its files, wherever links lead."""
    files = [Input("a weight file", file) for file in sorted(checkpoint_files(source.checkpoint))]
    return [Input("the checkpoint", source.checkpoint.folder), *files]


def as_path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def refuse_kv_cache(kv_cache: str | None) -> None:
    if kv_cache in (None, "float"):
        return
    if kv_cache == "int8":
        fact = (
            "the engines' W4A8 path takes no int8 KV cache: its scales exclude mixed int4 experts, and quantizing the "
            "latent costs two to three points of accuracy."
        )
        raise FxquantError("--kv-cache int8", fact, "Leave the cache in float: it is already latent, 71 times smaller.")
    raise FxquantError(f"--kv-cache {kv_cache}", "unknown.", "Only float is supported.")
