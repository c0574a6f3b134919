"""The verbs of the command line as functions: compile, plan, convert, verify, run, evaluate, compare."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fxquant.binding import Ledger
from fxquant.checkpoint import Checkpoint, open_checkpoint
from fxquant.contracts import Contract, load_contract
from fxquant.errors import FxquantError
from fxquant.frontend.source import TRACE_TIMEOUT, open_source
from fxquant.generation import greedy_text
from fxquant.lowering.convert import converted_contents
from fxquant.lowering.engines import ENGINES, group_size
from fxquant.lowering.layout import stored_tensors
from fxquant.lowering.manifest import FLOAT_GRAPH, GRAPH, MANIFEST, SourceFile, find_manifest, read_manifest
from fxquant.lowering.output import Contents, Output, Work, check_out, write_output
from fxquant.lowering.verify import Rebuild, VerifyReport, verify_output
from fxquant.lowering.weights import CheckpointProducer, Workers
from fxquant.lowering.workspace import unfinished_folder
from fxquant.measure import Evaluation, evaluate_programs
from fxquant.passes import CheckContract, PassResult
from fxquant.planning import Plan, plan
from fxquant.policy import Policy, Rule, load_policy
from fxquant.preparation import (
    DEFAULT_POLICY,
    CompileOptions,
    Prepared,
    as_path,
    open_model,
    prepare,
    refuse_kv_cache,
)
from fxquant.program import Program
from fxquant.program_file import load_program
from fxquant.progress import Reporter, silent
from fxquant.source_reader import checkpoint_files, stamp_files
from fxquant.targets import Target
from fxquant.text import load_batches
from fxquant.weights import Cached, Read, RecipeReader

COMPARE_CACHE = 1 << 28
"""Bytes of made weights that `compare` keeps for each policy between chunks of text."""


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

    @property
    def contract(self) -> Contract:
        """What the target loads, and how to serve it."""
        return load_contract(self.target)

    @property
    def unverified(self) -> list[str]:
        """What nobody has shown to work or to fail on the target, each with its source."""
        checks = (one.kept.items() for one in self.passes if one.name == CheckContract.name)
        return list(dict.fromkeys(f"{fact} ({source})" for check in checks for fact, source in check))


def compile(model: str | Path, options: CompileOptions | None = None, report: Reporter = silent) -> CompileReport:  # noqa: A001
    """Trace MODEL, rewrite it under the policy, write weights and graph for the target, verify, and name it `out`.

    Work happens in `<out>.partial`; `out` appears by rename when all of it is complete and verified. Raises
    FxquantError for anything wrong with the input, before a weight is read where headers tell.
    """
    options = options or CompileOptions()
    options = replace(options, target=Target(options.target))
    refuse_kv_cache(options.kv_cache)
    source = open_model(model, options, report)
    policy = load_policy(options.policy or source.policy or DEFAULT_POLICY)
    out = as_path(options.out) or Path(f"{source.name}-{policy.name}-{options.target}")
    check_out(out, options.force, source.checkpoint.folder)
    work = Work(options.workers, options.earlier_output(out), options.restart)
    known = [unfinished_folder(out)] if not options.restart else []
    prepared = prepare(source, policy, options, report, known=known + ([work.reuse] if work.reuse else []))
    with write_output(_contents(prepared, options), out, work, report) as output:
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


def _contents(prepared: Prepared, options: CompileOptions) -> Contents:
    source = prepared.source
    stamps = stamp_files(checkpoint_files(source.checkpoint))
    return Contents(
        program=prepared.program,
        checkpoint=source.checkpoint,
        producer=CheckpointProducer(source.checkpoint, stamps),
        stamps=stamps,
        sources={file.name: SourceFile(header=s.header, size=s.size) for file, s in sorted(stamps.items())},
        calibration=prepared.calibration,
        float_graph=prepared.float_graph,
        ledger=prepared.ledger.as_json(),
        source=source.path,
        origin=source.checkpoint.folder,
        policy=prepared.policy.name,
        target=options.target,
        max_shard_size=options.max_shard_size,
        tp=options.tp,
        export=options.export,
    )


@dataclass
class ConvertReport:
    """What `convert` did."""

    out: Path
    target: Target
    policy: str
    output: Output
    verification: VerifyReport | None = None


def convert(
    out: str | Path,
    target: Target,
    into: str | Path | None = None,
    tp: int = 1,
    verify: bool = True,
    force: bool = False,
    report: Reporter = silent,
    export: bool = True,
    workers: Workers | None = None,
    restart: bool = False,
) -> ConvertReport:
    """Write the weights of `out` in the form of another target, integers untouched, and the graph that goes with them.

    Raises FxquantError where the other form has no place for them, with the command that quantizes anew.
    """
    folder, target = Path(out), Target(target)
    new = Path(into) if into else Path(f"{folder.resolve().name}-{target}")
    check_out(new, force, folder)
    contents = replace(converted_contents(folder, target, new), tp=tp, export=export)
    CheckContract(contents.policy, load_contract(target), tp)(contents.program)
    source = open_checkpoint(contents.origin) if contents.origin.is_dir() else None
    with write_output(contents, new, Work(workers or Workers(), None, restart), report) as output:
        verification = verify_output(output.folder, source, full=False, report=report) if verify else None
        if verification is not None and not verification.ok:
            raise FxquantError(new, "verification failed, nothing was kept: " + first_miss(verification), "Report it.")
    return ConvertReport(new, target, contents.policy, output, verification)


def verify(
    out: str | Path,
    against: str | Path | None = None,
    full: bool = False,
    report: Reporter = silent,
    tp: int | None = None,
    target: Target | None = None,
    rebuild: Rebuild | None = None,
) -> VerifyReport:
    """Re-read `out` and hold it against MODEL (default: the manifest's source), its own graph, and its engine's reader.

    `tp`: ranks that the reader splits over; None: as many as `out` was compiled for.
    `target`: where the manifest is gone; None: what the files show. `against` must then be given.
    `rebuild`: derive so many weights anew from the source with the kernels, and compare bytes.
    """
    folder = Path(out)
    manifest = find_manifest(folder)
    checkpoint = None
    if against is not None:
        checkpoint = open_source(Path(against)).checkpoint
    elif manifest is None:
        raise FxquantError(folder, f"has no {MANIFEST} to say what it was made from.", "Pass --against MODEL.")
    elif manifest.checkpoint_path(folder).is_dir():
        checkpoint = open_checkpoint(manifest.checkpoint_path(folder))
    if rebuild is not None and checkpoint is None:
        raise FxquantError(folder, "its source is not there to rebuild from.", "Pass --against MODEL.")
    return verify_output(folder, checkpoint, full, report, tp, target, rebuild)


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


def engine_perplexities(
    out: str | Path, text: str | Path, samples: int = 64, length: int = 256, report: Reporter = silent
) -> dict[str, float]:
    """Perplexity of `out` as its engine computes it: "<reader>, exact" with the formats' own arithmetic, and
    "<reader>, device" with the rounding of the NPU's kernels. Raises FxquantError where no engine reads `out`."""
    from fxquant.lowering.readers import Arithmetic, open_reader
    from fxquant.lowering.verify.through_reader import reader_perplexity

    folder = Path(out)
    manifest, (program, read) = read_manifest(folder), open_output(folder)
    name = ENGINES[Target(manifest.target)].reader(group_size(program))
    if name is None:
        raise FxquantError(folder, f"target {manifest.target} has no engine to emulate.", "Leave out --engine.")
    batches = load_batches(Path(text), Checkpoint(folder, program.config, {}), samples, length)
    reader = open_reader(name, folder, manifest.tp)
    ways = {"exact": Arithmetic.EXACT, "device": Arithmetic.KERNEL}
    return {
        f"{name}, {way}": reader_perplexity(program, reader, read, batches, arithmetic, report)
        for way, arithmetic in ways.items()
    }


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
    source = open_model(model, options, report)
    batches = load_batches(Path(text), source.checkpoint, samples, length)
    original = (source.program(), Cached(source.checkpoint.read))
    programs = [prepare(source, load_policy(name), options, report, for_engine=False).program for name in policies]
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


__all__ = [
    "CompileOptions",
    "CompileReport",
    "ConvertReport",
    "Plan",
    "compare",
    "compile",
    "convert",
    "engine_perplexities",
    "evaluate",
    "open_graph",
    "plan",
    "prepare",
    "run",
    "verify",
]
