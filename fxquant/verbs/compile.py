"""Compile: MODEL and options → a verified output folder."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from fxquant.calibration.calibration_file import Calibration
from fxquant.calibration.resume_folder import calibration_folder
from fxquant.checkpoint.stamped_bytes import checkpoint_files, stamp_files
from fxquant.compilation.ledger import Ledger
from fxquant.compilation.options import CompileOptions, as_path, refuse_kv_cache
from fxquant.compilation.prepare import Prepared, named_policy, open_model, prepare, source_inputs
from fxquant.engines.contract import Contract, load_contract
from fxquant.engines.rank_layout import checked_layout
from fxquant.engines.reserves import reserves
from fxquant.engines.table import ENGINES, Target
from fxquant.frontend.source import Source
from fxquant.lowering.destination import Destination, open_destination
from fxquant.lowering.output import Contents, Output, Work, write_output
from fxquant.lowering.output_folder.manifest import SourceFile
from fxquant.lowering.output_folder.serving_page import serve_line, serving_of
from fxquant.lowering.weights import CheckpointProducer
from fxquant.lowering.workspace import known_folders
from fxquant.passes import PassResult, choices, findings
from fxquant.passes.check_contract import linears
from fxquant.policy.policy import Policy, Rule, load_policy
from fxquant.progress import Reporter, silent
from fxquant.runtime.device import open_device
from fxquant.storage.system_errors import stopping
from fxquant.verbs.verify import refuse_unverified
from fxquant.verification import VerifyReport, verify_output


@dataclass(kw_only=True)
class CompileReport:
    """What `compile` did.

    input_kind       the kind of MODEL: a folder, or a model.py of some family
    structural_hash  of the float graph, equal for graphs that compute the same
    reserves         what the target accepts though nobody ran it, by how that is known
    calibration      what static linears and experts saw, None if nothing is static
    serve            how to serve the output: a command or a setting, as one line
    graph_only       the output is for the graph beside the weights alone
    config_notes     keys of config.json that are not read, or that other code reads in another way
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
    config_notes: list[str] = field(default_factory=list)
    reserves: list[str] = field(default_factory=list)
    verification: VerifyReport | None = None
    calibration: Calibration | None = None

    @property
    def notes(self) -> list[str]:
        """What nobody asked for: `config_notes`, folders created, damaged units quantized again."""
        return [*self.config_notes, *self.output.notes]

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
        config_notes=source.notes,
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
        onnx=options.onnx_form(),
    )
