"""The verbs of the command line as functions: compile, verify, run, evaluate."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from fxquant.binding import Ledger, build_ledger, check_parameters, mtp_modules
from fxquant.checkpoint import open_checkpoint
from fxquant.errors import FxquantError
from fxquant.frontend.source import TRACE_TIMEOUT, Source, open_source
from fxquant.generation import greedy_text
from fxquant.lowering.layout import stored_tensors
from fxquant.lowering.manifest import FLOAT_GRAPH, GRAPH, read_manifest
from fxquant.lowering.output import Output, check_out, write_output
from fxquant.lowering.verify import VerifyReport, verify_output
from fxquant.measure import Evaluation, evaluate_programs
from fxquant.models.deepseek_v3 import mtp_paths
from fxquant.passes import AssignSchemes, Calibrate, PassResult, pipeline, run_passes
from fxquant.policy import Policy, Rule, load_policy
from fxquant.program import Program
from fxquant.program_file import dump_program, load_program
from fxquant.progress import Reporter, silent
from fxquant.structure import structural_hash
from fxquant.targets import Target
from fxquant.text import load_batches
from fxquant.weights import Cached, Read, RecipeReader

CALIBRATION_FILES = ("calibration.jsonl", "calibration.txt", "calib.jsonl", "calib.txt")
DEFAULT_POLICY = "deepseek_w4a8"
COMPARE_CACHE = 1 << 28
"""Bytes of made weights that `compare` keeps for each policy between chunks of text."""


@dataclass(frozen=True)
class CompileOptions:
    """What `compile` takes besides the model.

    policy          name of a shipped policy or path of a YAML file; None: the model file's POLICY or deepseek_w4a8
    out             output folder; None: `./<name>-<policy>-<target>`
    calib           calibration text or token ids; None: the file that lies beside the model, if any
    calib_samples   batches to calibrate on, each of at most `calib_length` tokens
    checkpoint      overrides the folder that a model.py names
    trace_timeout   seconds that a model.py may take to import, build and trace
    max_shard_size  bytes of tensor data a weight file may hold
    force           replace an earlier output of fxquant at `out`
    """

    policy: str | None = None
    out: str | Path | None = None
    target: Target = Target.ASCEND
    calib: str | Path | None = None
    calib_samples: int = 32
    calib_length: int = 256
    checkpoint: str | Path | None = None
    trace_timeout: float = TRACE_TIMEOUT
    max_shard_size: int = 4 << 30
    force: bool = False
    verify: bool = True
    kv_cache: str | None = None


@dataclass
class CompileReport:
    """What `compile` did.

    way_in           the kind of MODEL: a folder, or a model.py of some family
    structural_hash  of the float graph, equal for graphs that compute the same
    """

    out: Path
    way_in: str
    structural_hash: str
    policy: Policy
    target: Target
    ledger: Ledger
    passes: list[PassResult]
    idle_rules: list[Rule]
    output: Output
    verification: VerifyReport | None = None


@dataclass
class Prepared:
    """A model rewritten under a policy, nothing written yet."""

    source: Source
    policy: Policy
    program: Program
    ledger: Ledger
    float_graph: str
    structural_hash: str
    passes: list[PassResult] = field(default_factory=list)


def compile(model: str | Path, options: CompileOptions | None = None, report: Reporter = silent) -> CompileReport:  # noqa: A001
    """Trace MODEL, rewrite it under the policy, write weights and graph for the target, verify, and name it `out`.

    Work happens in `<out>.partial`; `out` appears by rename when all of it is complete and verified. Raises
    FxquantError for anything wrong with the input, before a weight is read where headers tell.
    """
    options = options or CompileOptions()
    options = replace(options, target=Target(options.target))
    _refuse_kv_cache(options.kv_cache)
    source = _open(model, options, report)
    policy = load_policy(options.policy or source.policy or DEFAULT_POLICY)
    out = _path(options.out) or Path(f"{source.name}-{policy.name}-{options.target}")
    check_out(out, options.force, source.checkpoint.folder)
    prepared = prepare(source, policy, options, report)
    with write_output(prepared, options, out, report) as output:
        verification = None
        if options.verify:
            verification = verify_output(output.folder, source.checkpoint, full=False, report=report)
            if not verification.ok:
                raise FxquantError(
                    out, "verification failed, nothing was kept: " + first_miss(verification), "Report it."
                )
    return CompileReport(
        out,
        source.way_in,
        prepared.structural_hash,
        policy,
        options.target,
        prepared.ledger,
        prepared.passes,
        prepared.program.idle_rules,
        output,
        verification,
    )


def prepare(source: Source, policy: Policy, options: CompileOptions, report: Reporter = silent) -> Prepared:
    """Trace, check against the checkpoint, and run the pass pipeline."""
    with report("trace", 1, "graph") as advance:
        program = source.program()
        advance(1)
    check_parameters(program, source.checkpoint)
    float_graph, digest = dump_program(program), structural_hash(program)
    mtp = mtp_modules(source.checkpoint, mtp_paths(source.config))
    assign = AssignSchemes(policy, mtp)
    calibrate = Calibrate(policy, source.checkpoint.read, lambda: calibration(source, options), report)
    results = run_passes(program, pipeline(assign, calibrate))
    return Prepared(
        source, policy, program, build_ledger(program, source.checkpoint, mtp), float_graph, digest, results
    )


def calibration(source: Source, options: CompileOptions) -> list[Tensor] | None:
    """Batches of token ids from `options.calib`, or from the file beside the model; None when there is neither."""
    file = _path(options.calib)
    if file is None:
        folders = (source.path if source.path.is_dir() else source.path.parent, source.checkpoint.folder)
        candidates = (folder / name for folder in folders for name in CALIBRATION_FILES)
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        return None
    return load_batches(file, source.checkpoint, options.calib_samples, options.calib_length)


def verify(
    out: str | Path, against: str | Path | None = None, full: bool = False, report: Reporter = silent
) -> VerifyReport:
    """Re-read `out` and hold it against MODEL (default: the manifest's source) and its own graph."""
    folder = Path(out)
    manifest = read_manifest(folder)
    checkpoint = None
    if against is not None:
        checkpoint = open_source(Path(against)).checkpoint
    elif manifest.checkpoint_path(folder).is_dir():
        checkpoint = open_checkpoint(manifest.checkpoint_path(folder))
    return verify_output(folder, checkpoint, full, report)


def run(out: str | Path, prompt: str, max_new_tokens: int = 64) -> Iterator[str]:
    """Greedy text after `prompt`, piece by piece: from the ONNX graph if `out` has one, else from its fx graph."""
    folder = Path(out)
    program, read = open_output(folder)
    return greedy_text(folder, program, read, prompt, max_new_tokens)


def open_output(folder: Path) -> tuple[Program, Read]:
    """The rewritten graph of an output folder and a reader of its weights."""
    from fxquant.lowering.verify.weights import WeightFiles

    read_manifest(folder)
    return load_program(folder / GRAPH), Cached(WeightFiles(folder).read)


def evaluate(
    out: str | Path,
    text: str | Path,
    against: str | Path | None = None,
    samples: int = 64,
    length: int = 256,
    report: Reporter = silent,
) -> Evaluation:
    """Perplexity of the float model and of the rewritten graph of `out`, and the KL divergence between them.

    Without `against` the float graph is the one that `out` carries, on the checkpoint that the manifest names: no code
    of a model file runs.
    """
    folder = Path(out)
    manifest = read_manifest(folder)
    if against is None:
        checkpoint = open_checkpoint(manifest.checkpoint_path(folder))
        program = load_program(folder / FLOAT_GRAPH)
    else:
        source = open_source(Path(against))
        checkpoint, program = source.checkpoint, source.program()
    quantized, original = open_output(folder), (program, Cached(checkpoint.read))
    batches = load_batches(Path(text), checkpoint, samples, length)
    return evaluate_programs(original, [quantized], batches, report)[0]


def compare(
    model: str | Path,
    policies: list[str],
    text: str | Path,
    options: CompileOptions | None = None,
    samples: int = 64,
    length: int = 256,
    report: Reporter = silent,
) -> dict[str, tuple[Evaluation, int]]:
    """Policy → its evaluation and the bytes of its weights. Nothing is written; integers are made as needed."""
    options = options or CompileOptions()
    source = _open(model, options, report)
    batches = load_batches(Path(text), source.checkpoint, samples, length)
    original = (source.program(), Cached(source.checkpoint.read))
    programs = [prepare(source, load_policy(name), options, report).program for name in policies]
    sizes = [sum(tensor.nbytes for tensor in stored_tensors(one, source.checkpoint)) for one in programs]
    quantized = [(one, Cached(RecipeReader(one, source.checkpoint), COMPARE_CACHE)) for one in programs]
    results = evaluate_programs(original, quantized, batches, report)
    return dict(zip(policies, zip(results, sizes, strict=True), strict=True))


def open_graph(model: str | Path, checkpoint: Path | None = None, trace_timeout: float = TRACE_TIMEOUT) -> Program:
    """The rewritten graph of a compiled folder, or the float graph of a model."""
    folder = Path(model)
    if (folder / GRAPH).is_file():
        return load_program(folder / GRAPH)
    return open_source(folder, checkpoint, trace_timeout).program()


def first_miss(verification: VerifyReport) -> str:
    """The first thing verification found, with its check."""
    return next(f"{check.name}: {check.misses[0]}" for check in verification.checks if check.misses)


def _open(model: str | Path, options: CompileOptions, report: Reporter) -> Source:
    """MODEL, opened; a model.py is run meanwhile."""
    with report("open", 1, "model") as advance:
        source = open_source(Path(model), _path(options.checkpoint), options.trace_timeout)
        advance(1)
    return source


def _path(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _refuse_kv_cache(kv_cache: str | None) -> None:
    if kv_cache in (None, "float"):
        return
    if kv_cache == "int8":
        fact = (
            "the engines' W4A8 path takes no int8 KV cache: its scales exclude mixed int4 experts, and quantizing the "
            "latent costs two to three points of accuracy."
        )
        raise FxquantError("--kv-cache int8", fact, "Leave the cache in float: it is already latent, 71 times smaller.")
    raise FxquantError(f"--kv-cache {kv_cache}", "unknown.", "Only float is supported.")


__all__ = [
    "CompileOptions",
    "CompileReport",
    "compare",
    "compile",
    "evaluate",
    "open_graph",
    "prepare",
    "run",
    "verify",
]
