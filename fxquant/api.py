"""Python API, the verbs as functions: compile, plan, convert, verify, run, evaluate, sensitivity, compare."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fxquant.calibration.calibration_file import Calibration
from fxquant.calibration.resume_folder import calibration_folder
from fxquant.checkpoint.checkpoint import open_checkpoint
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.compilation.ledger import Ledger
from fxquant.compilation.options import CompileOptions, as_path, refuse_kv_cache
from fxquant.compilation.prepare import Prepared, named_policy, open_model, prepare, source_inputs
from fxquant.engines.contract import Contract, load_contract
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.reserves import reserves
from fxquant.engines.table import ENGINES, Target
from fxquant.errors import FxquantError
from fxquant.evaluation.verbs import compare, engine_perplexities, evaluate, open_output, run, sensitivity
from fxquant.foreign.contents import foreign_contents
from fxquant.foreign.found import is_foreign
from fxquant.frontend.source import TRACE_TIMEOUT, Source, open_source
from fxquant.lowering.convert import ConvertOptions, converted_contents
from fxquant.lowering.destination import Destination, Input, open_destination
from fxquant.lowering.output import Contents, Output, Work, write_output
from fxquant.lowering.output_folder.manifest import (
    GRAPH,
    MANIFEST,
    SourceFile,
    find_manifest,
)
from fxquant.lowering.output_folder.serving_page import serve_line, serving_of
from fxquant.lowering.weights import CheckpointProducer, Workers
from fxquant.lowering.workspace import known_folders
from fxquant.passes import CheckContract, PassResult, choices, findings
from fxquant.passes.check_contract import linears
from fxquant.planning.plan import Plan, plan
from fxquant.policy.policy import Policy, Rule, load_policy
from fxquant.program.program import Program
from fxquant.program.program_file import load_program
from fxquant.progress import Reporter, silent
from fxquant.runtime.device import open_device
from fxquant.storage.system_errors import stopping
from fxquant.verification import Rebuild, VerifyReport, verify_foreign, verify_output


@dataclass(kw_only=True)
class CompileReport:
    """What `compile` did.

    input_kind       the kind of MODEL: a folder, or a model.py of some family
    structural_hash  of the float graph, equal for graphs that compute the same
    reserves         what the target accepts though nobody ran it, by how that is known
    calibration      what static linears and experts saw, None if nothing is static
    serve            how to serve the output: a command or a setting, as one line
    graph_only       the output is for the graph beside the weights alone
    """

    out: Path
    input_kind: str
    structural_hash: str
    policy: Policy
    target: Target
    ledger: Ledger
    passes: list[PassResult]
    unused_rules: list[Rule]
    output: Output
    serve: str
    graph_only: bool = False
    reserves: list[str] = field(default_factory=list)
    verification: VerifyReport | None = None
    calibration: Calibration | None = None

    @property
    def notes(self) -> list[str]:
        """Unrequested events: folders created, damaged units quantized again."""
        return self.output.notes

    @property
    def contract(self) -> Contract:
        """What the target loads."""
        return load_contract(self.target)

    @property
    def choices(self) -> list[str]:
        """What the policy left open, as it was decided."""
        return choices(self.passes)

    @property
    def unverified(self) -> list[str]:
        """What has been shown neither to work nor to fail on the target, each with its source."""
        return findings(self.passes)


def compile(model: str | Path, options: CompileOptions | None = None, report: Reporter = silent) -> CompileReport:  # noqa: A001
    """Trace MODEL, rewrite it under the policy, write weights and graph for the target, verify, and name it `out`.

    Work happens in `<out>.calibrating` and `<out>.partial`; `out` appears by rename when all of it is complete and
    verified. Raises FxquantError for any wrong input, before weights are read if headers show it.
    """
    options = options or CompileOptions()
    options = replace(options, target=Target(options.target))
    with stopping():
        return _compile(model, options, report)


def _compile(model: str | Path, options: CompileOptions, report: Reporter) -> CompileReport:
    refuse_kv_cache(options.kv_cache)
    open_device(options.device)
    if options.out is not None:
        open_destination(Path(options.out), options.force, options.inputs(Path(model))).forget()
    source = open_model(model, options, report)
    policy = load_policy(named_policy(options, source))
    out = as_path(options.out) or Path(f"{source.name}-{policy.name}-{options.target}")
    inputs = [*options.inputs(Path(model)), *source_inputs(source)]
    destination = open_destination(out, options.force, inputs)
    with destination.telling():
        options.workers.check()
        return _compiled(source, policy, options, destination, report)


def _compiled(
    source: Source, policy: Policy, options: CompileOptions, destination: Destination, report: Reporter
) -> CompileReport:
    reuse = options.earlier_output(destination.out)
    known = known_folders(destination) if not options.restart else []
    known += [reuse] if reuse else []
    with calibration_folder(destination.out, options.restart, source.checkpoint) as folder:
        prepared = prepare(source, policy, options, report, known=known, folder=folder)
        work = Work(options.workers, reuse, options.restart, options.reuse is None, folder.remove)
        contents = _contents(prepared, options)
        output, verification = _written(prepared, contents, options, destination, work, report)
    return CompileReport(
        out=destination.named,
        input_kind=source.input_kind,
        structural_hash=prepared.structural_hash,
        policy=policy,
        target=options.target,
        ledger=prepared.ledger,
        passes=prepared.passes,
        unused_rules=prepared.program.unused_rules,
        output=output,
        reserves=reserves(load_contract(options.target), linears(prepared.program)),
        serve=serve_line(contents.target, contents.serving, str(destination.named)),
        graph_only=contents.serving is None,
        verification=verification,
        calibration=prepared.calibration,
    )


def _written(
    prepared: Prepared,
    contents: Contents,
    options: CompileOptions,
    destination: Destination,
    work: Work,
    report: Reporter,
) -> tuple[Output, VerifyReport | None]:
    with write_output(contents, destination, work, report) as output:
        if not options.verify:
            return output, None
        verification = verify_output(output.folder, prepared.source.checkpoint, full=False, report=report)
        refuse_unverified(output, destination, verification)
        return output, verification


def refuse_unverified(output: Output, destination: Destination, verification: VerifyReport) -> None:
    """Raise FxquantError if verification found a difference."""
    if verification.ok:
        return
    if output.folder == destination.named:
        fact = "is complete, but is not as it was written: " + first_miss(verification)
        raise FxquantError(destination.named, fact, "Pass --force to write it again.")
    fact = "verification failed, nothing was kept: " + first_miss(verification)
    raise FxquantError(destination.named, fact, "Report it.")


def _contents(prepared: Prepared, options: CompileOptions) -> Contents:
    source = prepared.source
    stamps = stamp_files(checkpoint_files(source.checkpoint))
    contract, described = load_contract(options.target), linears(prepared.program)
    alone = options.graph_only and ENGINES[options.target].model_code
    return Contents(
        program=prepared.program,
        checkpoint=prepared.checkpoint,
        producer=CheckpointProducer(prepared.checkpoint, stamps, prepared.solved),
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
        layout=checked_layout(contract, described, options.tp, options.ep, options.mix),
        serving=None if alone else serving_of(prepared.program, options.target, options.tp, options.ep),
        export=options.export,
    )


@dataclass(kw_only=True)
class ConvertReport:
    """What `convert` did."""

    out: Path
    target: Target
    policy: str
    output: Output
    serve: str
    verification: VerifyReport | None = None

    @property
    def notes(self) -> list[str]:
        """Unrequested events."""
        return self.output.notes


def convert(
    out: str | Path,
    target: Target,
    into: str | Path | None = None,
    tp: int | None = None,
    verify: bool = True,
    force: bool = False,
    report: Reporter = silent,
    export: bool = True,
    workers: Workers | None = None,
    restart: bool = False,
    ep: int | None = None,
    graph_only: bool = False,
    against: str | Path | None = None,
) -> ConvertReport:
    """Write the weights of `out` in another target's format, integers unchanged, and the matching graph.

    `against`: the model that a folder of others was made from; None: its config.json says what the model is.
    Raises FxquantError if that format cannot hold them, with the command that quantizes again.
    """
    folder, target = Path(out), Target(target)
    new = Path(into) if into else Path(f"{folder.resolve().name}-{target}")
    with stopping():
        destination = open_destination(new, force, [Input("the folder to convert", folder)])
        with destination.telling():
            contents = _convertible(folder, target, new, against, ConvertOptions(tp, ep, graph_only, export))
            if contents.serving is not None:
                CheckContract(contents.policy, load_contract(target), tp, ep)(contents.program)
            there = contents.origin.is_dir() and contents.origin != folder
            source = open_checkpoint(contents.origin) if there else None
            with write_output(contents, destination, Work(workers or Workers(), None, restart), report) as output:
                verification = verify_output(output.folder, source, full=False, report=report) if verify else None
                if verification is not None:
                    refuse_unverified(output, destination, verification)
    return ConvertReport(
        out=new,
        target=target,
        policy=contents.policy,
        output=output,
        serve=serve_line(target, contents.serving, str(new)),
        verification=verification,
    )


def _convertible(
    folder: Path, target: Target, into: Path, against: str | Path | None, options: ConvertOptions
) -> Contents:
    if is_foreign(folder):
        source = None if against is None else open_source(Path(against))
        return foreign_contents(folder, target, source, options)
    if against is not None:
        fact = f"applies only to folders that others wrote; {folder} names its model."
        raise FxquantError(f"--against {against}", fact, "Leave it out.")
    return converted_contents(folder, target, into, options)


def verify(
    out: str | Path,
    against: str | Path | None = None,
    full: bool = False,
    report: Reporter = silent,
    tp: int | None = None,
    target: Target | None = None,
    rebuild: Rebuild | None = None,
    ep: int | None = None,
) -> VerifyReport:
    """Check `out` against MODEL (default: the manifest's source), its own graph, and its engine's reader.

    A folder that others wrote, without a file of ours, is checked tensor by tensor, within its schemes.

    `tp`, `ep`: ranks that the reader splits over; None: those that `out` was compiled for.
    `target`: for a folder without a manifest; None: as the files show. `against` must then be given.
    `rebuild`: quantize that many units again from the source with the kernels, and compare bytes.
    """
    folder = Path(out)
    if is_foreign(folder):
        return _verify_foreign(folder, against, full, report, tp, target, rebuild, ep)
    manifest = find_manifest(folder)
    checkpoint = None
    if against is not None:
        checkpoint = open_source(Path(against)).checkpoint
    elif manifest is None:
        raise FxquantError(folder, f"has no {MANIFEST} to say what it was made from.", "Pass --against MODEL.")
    elif manifest.foreign and manifest.checkpoint == manifest.source:
        checkpoint = None  # converted without its model
    elif manifest.checkpoint_path(folder).is_dir():
        checkpoint = open_checkpoint(manifest.checkpoint_path(folder))
    if rebuild is not None and checkpoint is None:
        raise FxquantError(folder, "the source to rebuild it from is missing.", "Pass --against MODEL.")
    return verify_output(folder, checkpoint, full, report, tp, target, rebuild, ep)


def _verify_foreign(
    folder: Path,
    against: str | Path | None,
    full: bool,
    report: Reporter,
    tp: int | None,
    target: Target | None,
    rebuild: Rebuild | None,
    ep: int | None,
) -> VerifyReport:
    if rebuild is not None:
        raise FxquantError("--rebuild", f"{folder} was not written by fxquant.", "Leave it out.")
    source = None if against is None else open_source(Path(against))
    return verify_foreign(folder, source, full, report, tp, target, ep)


def open_graph(model: str | Path, checkpoint: Path | None = None, trace_timeout: float = TRACE_TIMEOUT) -> Program:
    """The rewritten graph of a compiled folder, or the float graph of a model."""
    folder = Path(model)
    if (folder / GRAPH).is_file():
        return load_program(folder / GRAPH)
    return open_source(folder, checkpoint, trace_timeout).program()


def first_miss(verification: VerifyReport) -> str:
    """The first difference that verification found, with its check."""
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
    "open_output",
    "plan",
    "prepare",
    "run",
    "sensitivity",
    "verify",
]
